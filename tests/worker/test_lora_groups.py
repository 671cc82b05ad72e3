import pytest

from lorry.kernels.page_layout import MODULES
from lorry.worker.lora_groups import LoraGroups


@pytest.mark.parametrize(
    ("modules", "groups"),
    [
        ([], LoraGroups.NONE),
        (["v_proj"], LoraGroups.ATTENTION),
        (["q_proj", "o_proj"], LoraGroups.ATTENTION),
        (["down_proj"], LoraGroups.ALL),
        (MODULES, LoraGroups.ALL),
    ],
)
def test_groups_are_the_smallest_set_with_a_graph(modules: list[str], groups: LoraGroups) -> None:
    assert LoraGroups.of(modules) is groups
