"""A short soak; ``python -m benchmarks.soak`` is the long one."""

from pathlib import Path

from benchmarks.soak.run import soak

SECONDS = 60.0  # of requests and faults, beside the starts and the count at the end


async def test_a_minute_of_everything_leaves_nothing_behind(tmp_path: Path) -> None:
    report = await soak(tmp_path, seconds=SECONDS, seed=20_260_101)
    print("\n".join(report.table()))
    assert not report.violations
    kinds = {kind for kind, _ in report.tally.ends}
    assert kinds >= {"patient", "whole", "leaving", "leaving at once", "hasty", "mistaken"}
    assert report.tally.total("OK") > report.tally.sent // 4
    assert {"worker killed", "store killed", "engine killed"} & report.faults.keys()
