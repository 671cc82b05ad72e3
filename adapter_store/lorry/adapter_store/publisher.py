"""From an upload's bytes to a published version."""

from collections.abc import Callable

from lorry.adapter_store.builders import Builders
from lorry.adapter_store.catalogue import Catalogue
from lorry.adapter_store.contents import Contents
from lorry.adapter_store.edits import publish
from lorry.adapter_store.limits import Limits
from lorry.adapter_store.records import Content, Published, UploadRecord, Version
from lorry.adapter_store.storage import Storage
from lorry.kernels.page_layout import Dtype
from lorry.rpc.errors import StoreFull, StoreUnavailable


class Publisher:
    """Validates what was uploaded and publishes it, once whoever asks and however often."""

    def __init__(
        self,
        *,
        storage: Storage,
        builders: Builders,
        catalogue: Catalogue,
        contents: Contents,
        limits: Limits,
        dtype: Dtype,
        now_ns: Callable[[], int],
    ) -> None:
        self._storage, self._backend, self._builders = storage, storage.backend, builders
        self._catalogue, self._contents = catalogue, contents
        self._limits, self._dtype, self._now_ns = limits, dtype, now_ns

    async def publish(self, record: UploadRecord) -> Published:
        """Raises AdapterInvalid or DigestMismatch for bytes that are not what was promised."""
        try:
            return await self._validate_and_publish(record)
        except (StoreFull, StoreUnavailable):
            raise
        except Exception:
            # Another store that finishes the same upload may have been faster, and dropped them.
            published = await self._catalogue.find_published(record.key)
            if published is None:
                raise
            return published

    async def _validate_and_publish(self, record: UploadRecord) -> Published:
        async with self._storage.entered(self._backend.staged(record.key)) as weights:
            checked = await self._builders.check_weights(
                weights,
                num_bytes=record.weights_bytes,
                sha256=record.weights_sha256,
                spec=record.spec,
                dtype=self._dtype,
            )
        now_ns = self._now_ns()
        version = Version(
            digest=checked.digest,
            max_rank=record.spec.max_rank,
            modules=tuple(record.spec.modules),
            weights_bytes=checked.weights_bytes,
            file_bytes=record.weights_bytes,
            upload=record.key,
            create_time_ns=now_ns,
            weights_sha256=record.weights_sha256,
            config_sha256=record.config_sha256,
        )
        kept = self._limits.versions_kept
        with self._contents.held(version.digest):
            content = Content(record.spec, checked.file_crc32c)
            await self._contents.keep(record.key, version.digest, content)
            change = await self._catalogue.change(
                record.name,
                lambda before: publish(before, record, version, now_ns=now_ns, kept=kept),
            )
        assert change.adapter is not None
        return Published(version, change.adapter)
