import gc
import weakref

from lorry.rpc.garbage import freeze_loaded


class Node:
    def __init__(self) -> None:
        self.itself = self


def test_what_is_loaded_is_passed_over_and_garbage_goes() -> None:
    node = Node()
    seen = weakref.ref(node)
    del node
    known = len(gc.get_objects())
    try:
        freeze_loaded()
        assert seen() is None
        assert len(gc.get_objects()) < known / 10
        later = weakref.ref(Node())
        gc.collect()
        assert later() is None
    finally:
        gc.unfreeze()
