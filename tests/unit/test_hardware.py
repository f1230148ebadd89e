"""What a CPU rank gets in its environment."""

import pytest

from fastdeploy.config.hardware import cpu_rank_environment

pytestmark = pytest.mark.timeout(60)


def test_defaults_for_a_rank_on_a_cpu() -> None:
    found = cpu_rank_environment({})
    assert "glibc.malloc.hugetlb=1:" in found.pop("GLIBC_TUNABLES")
    assert found == {"GOMP_SPINCOUNT": "10000"}


def test_what_the_user_set_stays() -> None:
    assert cpu_rank_environment({"GLIBC_TUNABLES": "", "OMP_WAIT_POLICY": "passive"}) == {}
    assert cpu_rank_environment({"GOMP_SPINCOUNT": "1", "GLIBC_TUNABLES": "x"}) == {}
