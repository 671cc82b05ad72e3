"""A tensor-parallel rank that schedules nothing: does what the first one tells."""

from lorry.worker.messages import ImageReady
from lorry.worker.rank_messages import (
    EndRank,
    FinishLoads,
    LoadAdapter,
    MapImage,
    RankMessage,
    RunStep,
    UnmapImage,
)
from lorry.worker.residency import Adapter
from lorry.worker.runner import RankRunner


class FollowingRank:
    def __init__(self, runner: RankRunner) -> None:
        self._runner = runner
        self._images: dict[bytes, ImageReady] = {}

    def handle(self, message: RankMessage) -> bool:
        """Do as told; False if nothing will come after it."""
        match message:
            case RunStep(work):
                self._runner.run(work)
            case MapImage(image):
                self._runner.adapters.map(image)
                self._images[image.version] = image
            case UnmapImage(version):
                self._runner.adapters.unmap(version)
                del self._images[version]
            case LoadAdapter(version, slot, pages):
                image = self._images[version]
                self._runner.adapters.begin_load(
                    Adapter(version, image=image, slot=slot, pages=pages)
                )
            case FinishLoads(count):
                self._runner.adapters.finish_loads(count)
            case EndRank():
                return False
        return True
