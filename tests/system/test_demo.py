import json
import subprocess
import sys

from demo.tasks import TASKS
from tests.support.command import REPO, child_environment


def test_the_demo_holds_what_it_promises() -> None:
    demo = subprocess.run(
        [sys.executable, "-m", "demo.run"],
        cwd=REPO,
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert demo.stderr == ""
    summary = json.loads(demo.stdout.splitlines()[-1])
    assert (summary["requests"], summary["adapters"]) == (200, 8)
    assert summary["max_adapters_in_step"] == 8
    assert set(summary["exact"]) == {*TASKS, "base"}
    assert min(summary["exact"].values()) > 0.97
    pool = summary["pool"]
    used = pool["pages_kv"] + pool["pages_adapter"] + pool["pages_cached"]
    assert pool["pages_total"] == pool["pages_free"] + used
    assert pool["pages_adapter"] > 0
    assert summary["ninth_save_to_first_token_s"] > 0
