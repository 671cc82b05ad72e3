from lorry.router.catalogue import AdapterVersion, Catalogue, Change
from lorry.rpc.names import AdapterName

A, B = AdapterName("t", "a"), AdapterName("t", "b")
ONE, TWO = AdapterVersion(b"1", 8, 0), AdapterVersion(b"2", 16, 0)


def snapshot(*changes: Change, revision: int = 5, store_id: str = "s") -> Catalogue:
    catalogue = Catalogue()
    catalogue.begin()
    catalogue.apply(changes, store_id=store_id, revision=revision, complete=True)
    return catalogue


def test_nothing_counts_before_the_snapshot_is_complete() -> None:
    catalogue = Catalogue()
    assert catalogue.begin() == 0
    catalogue.apply([Change(A, ONE)], store_id="s", revision=1, complete=False)
    assert catalogue.get(A) is None
    assert catalogue.revision == 0
    catalogue.apply([Change(B, TWO)], store_id="s", revision=5, complete=True)
    assert (catalogue.get(A), catalogue.get(B), catalogue.revision) == (ONE, TWO, 5)


def test_changes_apply_in_order() -> None:
    catalogue = snapshot(Change(A, ONE))
    changes = [Change(A, TWO), Change(B, ONE), Change(B, None)]
    catalogue.apply(changes, store_id="s", revision=8, complete=True)
    assert (catalogue.get(A), catalogue.get(B)) == (TWO, None)


def test_a_broken_watch_continues_from_the_last_revision() -> None:
    assert snapshot(Change(A, ONE), revision=7).begin() == 7


def test_a_new_snapshot_drops_names_that_it_does_not_hold() -> None:
    catalogue = snapshot(Change(A, ONE))
    catalogue.forget_revision()
    assert catalogue.begin() == 0
    catalogue.apply([Change(B, TWO)], store_id="s2", revision=1, complete=False)
    assert catalogue.get(A) == ONE, "a name stays until the new snapshot is complete"
    catalogue.apply([], store_id="s2", revision=2, complete=True)
    assert (catalogue.get(A), catalogue.get(B), catalogue.store_id) == (None, TWO, "s2")


def test_half_a_snapshot_is_thrown_away() -> None:
    catalogue = Catalogue()
    catalogue.begin()
    catalogue.apply([Change(A, ONE)], store_id="s", revision=1, complete=False)
    assert catalogue.begin() == 0
    catalogue.apply([Change(B, TWO)], store_id="s", revision=5, complete=True)
    assert catalogue.get(A) is None
