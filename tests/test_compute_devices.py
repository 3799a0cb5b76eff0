"""The accelerator table against lists that others maintain: dense rates, and none of the headlines with sparsity."""
from __future__ import annotations

import pytest

from fsdl_devinfra.compute import cluster as clusters
from fsdl_devinfra.compute.cluster import _NODES, TORUS, _node, cluster, device_named, local_device, recognise
from fsdl_devinfra.core.device_table import devices, find_device
from fsdl_devinfra.core.errors import BadInput

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
    assert device.bandwidth > 60 and device.source and device.memory_bytes < device.nominal_gb * 2**30


@pytest.mark.parametrize("device", devices(), ids=lambda d: d.name)
def test_every_device_has_a_node(device):
    c = cluster(device, 8)
    assert c.per_node >= 1 and c.link > 0 and c.network > 0 and c.host_bytes > 3 * 10**10


#: a chip of a family that the table of nodes does not name was given a made-up network of 12.5 GB/s: H800 said 569 tokens/s for DeepSeek-V3 where it ran at 1,543
@pytest.mark.parametrize("name,like", {"H800-SXM-80GB": "H100-SXM-80GB", "H20-SXM-141GB": "H100-SXM-80GB", "H20-SXM-96GB": "H100-SXM-80GB", "B100-SXM-180GB": "B200-SXM-180GB", "A800-SXM-80GB": "A100-SXM-80GB"}.items())
def test_chips_on_one_board_have_one_network(name, like):
    found, other = cluster(name, 16), cluster(like, 16)
    assert (found.per_node, found.network, found.host_bytes) == (other.per_node, other.network, other.host_bytes)


def test_every_accelerator_of_a_server_has_a_node_of_its_own():
    """No SXM part of NVIDIA's, no Grace chip and no Mac falls to the row `other`."""
    other = _NODES.strip().splitlines()[-1].split("|")[4].strip()
    assert other == "assumed"
    assumed = [d.name for d in devices() if _node(d)[3] == other]
    assert not [name for name in assumed if "SXM" in name and not name.startswith("P100") or name.startswith(("GB", "GH", "Apple", "RTX", "TPU"))], assumed
    assert cluster("gb300", 72).nodes == 1 and cluster("m4", 2).nodes == 2 and cluster("4090-laptop", 2).nodes == 2


#: cards in PCIe form: the bridge joins two and is sold apart; an NVL is sold with it
@pytest.mark.parametrize("name,gpus,linked", [("RTX-3090-24GB", 2, False), ("A100-PCIe-80GB", 8, False), ("H100-PCIe-80GB", 2, False), ("RTX-A6000-48GB", 2, False), ("H100-NVL-94GB", 2, True), ("H100-NVL-94GB", 8, False), ("H200-NVL-141GB", 4, True),
                                              ("H200-NVL-141GB", 8, False), ("pair=A100-PCIe-80GB,link=600", 2, True), ("cool=RTX-3090-24GB,watts=280", 2, False), ("A100-SXM-80GB", 8, True), ("V100-SXM-32GB", 8, True)])
def test_a_bridge_counts_where_it_is_there(name, gpus, linked):
    c = cluster(find_device(name), gpus)
    assert c.nvlink == linked and (c.link == c.pcie) == (not linked)
    assert bool(c.bridge) == (not linked)


def test_one_gpu_needs_no_bridge(): assert cluster("3090", 1).bridge == "" and cluster("4090", 2).bridge == ""


def test_nodes_name_their_source(): assert all(len(line.split("|")) == 5 and line.split("|")[4].strip() for line in _NODES.strip().splitlines()[1:])


@pytest.mark.parametrize("printed,name", {
    "NVIDIA A100-SXM4-40GB": "A100-SXM-40GB", "NVIDIA A100-PCIE-40GB": "A100-PCIe-40GB", "NVIDIA H100 80GB HBM3": "H100-SXM-80GB", "NVIDIA H100 NVL": "H100-NVL-94GB", "NVIDIA L40S": "L40S-48GB", "NVIDIA L4": "L4-24GB",
    "Tesla V100-SXM2-32GB": "V100-SXM-32GB", "Tesla V100-PCIE-16GB": "V100-PCIe-16GB", "NVIDIA GeForce RTX 4090": "RTX-4090-24GB", "NVIDIA RTX A6000": "RTX-A6000-48GB", "Tesla P100-PCIE-16GB": "P100-PCIe-16GB", "Tesla K80": "K80-PCIe-12GB",
}.items())
def test_names_that_the_driver_prints(printed, name): assert find_device(printed).name == name


#: what nvidia-smi prints: name and total MiB, from people's bug reports; the entry, or None and the nearest
SHOWN = {
    ("NVIDIA H100 80GB HBM3", 81559): "H100-SXM-80GB", ("NVIDIA H100 PCIe", 81559): "H100-PCIe-80GB", ("NVIDIA H100 NVL", 95830): "H100-NVL-94GB", ("NVIDIA H200", 143771): "H200-SXM-141GB", ("NVIDIA B200", 183359): "B200-SXM-180GB",
    ("NVIDIA A100-SXM4-40GB", 40960): "A100-SXM-40GB", ("NVIDIA A100-SXM4-80GB", 81920): "A100-SXM-80GB", ("NVIDIA A100-PCIE-40GB", 40960): "A100-PCIe-40GB", ("NVIDIA A100 80GB PCIe", 81920): "A100-PCIe-80GB", ("A100-SXM4-40GB", 40536): "A100-SXM-40GB",
    ("Tesla V100-SXM2-32GB", 32768): "V100-SXM-32GB", ("Tesla V100-SXM2-32GB", 32510): "V100-SXM-32GB", ("Tesla V100-SXM2-16GB", 16160): "V100-SXM-16GB", ("Tesla V100-PCIE-16GB", 16160): "V100-PCIe-16GB", ("Tesla V100-SXM3-32GB", 32510): "V100-SXM-32GB",
    ("Tesla T4", 15360): "T4-16GB", ("Tesla T4", 16127): "T4-16GB", ("NVIDIA L4", 23034): "L4-24GB", ("NVIDIA L40S", 46068): "L40S-48GB", ("NVIDIA A10G", 23028): "A10G-24GB", ("NVIDIA A10", 23028): "A10-24GB", ("NVIDIA A40", 46068): "A40-48GB",
    ("NVIDIA GeForce RTX 4090", 24564): "RTX-4090-24GB", ("NVIDIA GeForce RTX 3090", 24576): "RTX-3090-24GB", ("NVIDIA GeForce RTX 5090", 32607): "RTX-5090-32GB", ("GeForce RTX 2080 Ti", 11019): "RTX-2080Ti-11GB", ("NVIDIA RTX A6000", 49140): "RTX-A6000-48GB",
    ("Tesla P100-PCIE-16GB", 16280): "P100-PCIe-16GB", ("Tesla K80", 11441): "K80-PCIe-12GB", ("NVIDIA H100", 97871): "H100-SXM-96GB",
    # not in the table, or not the card of that name
    ("NVIDIA GH200 480GB", 97871): "GH200-SXM-96GB", ("NVIDIA RTX 6000 Ada Generation", 49140): "RTX-6000-Ada-48GB", ("NVIDIA L40", 46068): "L40-48GB", ("NVIDIA A30", 24576): "A30-24GB", ("NVIDIA H800", 81559): "H800-SXM-80GB", ("NVIDIA H20", 97871): "H20-SXM-96GB", ("NVIDIA A800-SXM4-80GB", 81920): "A800-SXM-80GB",
    ("NVIDIA GeForce RTX 4090 D", 24564): "RTX-4090D-24GB", ("NVIDIA GeForce RTX 4090 Laptop GPU", 16376): "RTX-4090-Laptop-16GB", ("NVIDIA GeForce RTX 3090 Ti", 24564): "RTX-3090Ti-24GB", ("NVIDIA GeForce RTX 4080", 16376): "RTX-4080-16GB", ("Quadro RTX 6000", 24576): None, ("NVIDIA A100-SXM-64GB", 65536): None,
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 9984): None, ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", 19968): None, ("NVIDIA A100-SXM4-80GB", 40960): None, ("GRID A100D-40C", 40960): None, ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 97887): "RTX-PRO-6000-96GB", ("Orin (nvgpu)", 62841): None, ("", 0): None,
}


@pytest.mark.parametrize("shown,name", SHOWN.items(), ids=lambda x: f"{x[0]} {x[1]}" if isinstance(x, tuple) else str(x))
def test_what_the_driver_shows_is_recognised_or_not_known(shown, name):
    """Name and memory must agree; whatever is not known has a reason and a nearest entry (a slice: the whole card's name)."""
    found = recognise(shown[0], shown[1] * 2**20)
    assert (found.device.name if found.device else None) == name
    if name is None: assert found.why and (found.nearest or "slice" in found.why)


def test_gpu_local(monkeypatch):
    """--gpu local: the card of this machine, and a sentence where there is none, an unknown one, or several kinds."""
    def shows(*cards): monkeypatch.setattr(clusters, "local_devices", lambda: [(n, m * 2**20) for n, m in cards])
    shows(("NVIDIA L4", 23034), ("NVIDIA L4", 23034))
    assert device_named("local").name == local_device().name == "L4-24GB" and device_named("h100").name == "H100-SXM-80GB"
    for cards, why in (((), "no NVIDIA driver"), ((("NVIDIA L50", 46068),), "nearest in the table is --gpu L40"), ((("NVIDIA L4", 23034), ("Tesla T4", 15360)), "several kinds")):
        shows(*cards)
        with pytest.raises(BadInput) as e: device_named("local")
        assert why in str(e.value)


@pytest.mark.parametrize("name", [d.name for d in devices() if d.name.startswith("TPU")])
def test_tpus_have_links_of_their_own(name):
    """No TPU is taken for a card on PCIe: a link from Google's figures or from the torus, and pods of the published sizes."""
    c = cluster(name, 16)
    assert c.nvlink and 150 <= c.link <= 650 and c.per_node in (256, 1024, 4096, 8960, 9216)
    assert bool(c.device.link) != any(name.startswith(t + "-") for t in TORUS)
