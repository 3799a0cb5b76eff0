"""The accelerator table against lists that others maintain: dense rates, and none of the headlines with sparsity."""
from __future__ import annotations

import pytest

from fsdl_devinfra.compute.cluster import _NODES, cluster
from fsdl_devinfra.core.devices import devices, find_device

#: dense bf16 TFLOP/s as facts from torchtitan's get_peak_flops (2026-08), composer's GPU_AVAILABLE_FLOPS (0.32) and S. Bekman's table; for fp16 where the chip has no bf16
BF16 = {"A100-SXM-40GB": 312, "A100-SXM-80GB": 312, "A100-PCIe-80GB": 312, "RTX-A6000-48GB": 154.85, "H100-NVL-94GB": 835, "H100-PCIe-80GB": 756, "H100-SXM-80GB": 989, "H200-SXM-141GB": 989,
        "GB200-SXM-186GB": 2500, "B200-SXM-180GB": 2250, "B300-SXM-288GB": 2250, "MI355X-288GB": 2500, "MI300X-192GB": 1300, "MI325X-256GB": 1300, "MI250X-128GB": 383, "L40S-48GB": 362,
        "A10-24GB": 125, "TPU-v4-32GB": 275, "TPU-v5e-16GB": 197, "TPU-v5p-95GB": 459, "TPU-v6e-32GB": 918, "TPU-v7-192GB": 2307}
FP16 = {"V100-SXM-16GB": 125, "V100-SXM-32GB": 125, "V100-PCIe-16GB": 112, "T4-16GB": 65}
#: what vendors print "with sparsity"
SPARSE = {"H100-SXM-80GB": 1979, "H200-SXM-141GB": 1979, "H100-PCIe-80GB": 1513, "L40S-48GB": 733, "L4-24GB": 242, "A100-SXM-80GB": 624, "B200-SXM-180GB": 4500, "RTX-A6000-48GB": 309.7, "A10-24GB": 250}


@pytest.mark.parametrize("name,rate", BF16.items())
def test_bf16_is_dense(name, rate): assert find_device(name).bf16 == pytest.approx(rate, rel=0.01)


@pytest.mark.parametrize("name,rate", FP16.items())
def test_fp16_where_there_is_no_bf16(name, rate):
    assert find_device(name).fp16 == rate and find_device(name).bf16 is None


@pytest.mark.parametrize("name,rate", SPARSE.items())
def test_no_headline_with_sparsity(name, rate): assert find_device(name).bf16 < 0.6 * rate


@pytest.mark.parametrize("device", devices(), ids=lambda d: d.name)
def test_a_row_is_possible(device):
    """Eight bits are twice sixteen, tf32 is half of it on matrix units, and a source is named."""
    if device.fp8 and device.bf16: assert device.fp8 == pytest.approx(2 * device.bf16, rel=0.02)
    if device.tf32 and device.bf16 and device.tf32 != device.fp32: assert device.tf32 == pytest.approx(device.bf16 / 2, rel=0.03)
    assert device.bandwidth > 100 and device.source and device.memory_bytes < device.nominal_gb * 2**30


@pytest.mark.parametrize("device", devices(), ids=lambda d: d.name)
def test_every_device_has_a_node(device):
    c = cluster(device, 8)
    assert c.per_node >= 1 and c.link > 0 and c.network > 0 and c.host_bytes > 10**11


def test_nodes_name_their_source(): assert all(len(line.split("|")) == 5 and line.split("|")[4].strip() for line in _NODES.strip().splitlines()[1:])


@pytest.mark.parametrize("printed,name", {
    "NVIDIA A100-SXM4-40GB": "A100-SXM-40GB", "NVIDIA A100-PCIE-40GB": "A100-PCIe-40GB", "NVIDIA H100 80GB HBM3": "H100-SXM-80GB", "NVIDIA H100 NVL": "H100-NVL-94GB", "NVIDIA L40S": "L40S-48GB", "NVIDIA L4": "L4-24GB",
    "Tesla V100-SXM2-32GB": "V100-SXM-32GB", "Tesla V100-PCIE-16GB": "V100-PCIe-16GB", "NVIDIA GeForce RTX 4090": "RTX-4090-24GB", "NVIDIA RTX A6000": "RTX-A6000-48GB", "Tesla P100-PCIE-16GB": "P100-PCIe-16GB", "Tesla K80": "K80-PCIe-12GB",
}.items())
def test_names_that_the_driver_prints(printed, name): assert find_device(printed).name == name
