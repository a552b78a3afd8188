"""GrinqhTensor within DTensor, and beside FSDP2, on CPUs and gloo.

Layers are cut as TorchAO's test of tensor parallelism does it.

Its own (``torchao.testing.utils.TorchAOTensorParallelTestCase``) only runs on CUDA and looks at no
results; this one cuts weights by its functions, and does look.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.testing._internal.distributed._tensor.common_dtensor import DTensorTestBase, with_comms
from torchao.quantization import quantize_
from torchao.testing import utils as torchao_testing

from grinqh_ao import GrinqhConfig, GrinqhTensor
from models import tiny_model


class OneLayer(nn.Module):
    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=False, dtype=dtype)
        quantize_(self, GrinqhConfig(bits=3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class TwoRanks(DTensorTestBase):
    world_size = 2

    # One test per number of ranks: processes take longer to start than to do all of it.
    @with_comms
    def test_all(self):
        mesh = self.build_device_mesh()
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            self.check_layers_cut_by_torchao(mesh, dtype)
        self.check_distribute_tensor(mesh)
        self.check_what_cannot_be_cut(mesh)
        self.check_fully_shard(mesh)
        self.check_fully_shard_of_a_model_with_whole_weights(mesh)
        self.check_ddp_of_what_is_on_top()

    def check_ddp_of_what_is_on_top(self):
        """As docs/distributed.md says; what is trained is averaged over ranks."""
        torch.manual_seed(self.rank)
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 128, bias=False))
        quantize_(model, GrinqhConfig(bits=3), lambda module, name: name == "1")
        codes = [n for n, p in model.named_parameters() if isinstance(p, GrinqhTensor)]
        assert codes == ["1.weight"]
        before = model[1].weight.dequantize()
        DDP._set_params_and_buffers_to_ignore_for_model(model, codes)
        ddp = DDP(model)
        assert torch.equal(model[1].weight.dequantize(), before)
        ddp(torch.randn(9, 64)).square().mean().backward()
        for parameter in model[0].parameters():
            for of_rank in (parameter.detach(), parameter.grad):
                found = [torch.empty_like(of_rank) for _ in range(self.world_size)]
                torch.distributed.all_gather(found, of_rank)
                assert all(torch.equal(one, found[0]) for one in found)
                assert found[0].abs().max() > 0

    def check_layers_cut_by_torchao(self, mesh, dtype):
        torch.manual_seed(5)
        up, down = OneLayer(256, 512, dtype), OneLayer(512, 256, dtype)
        x = torch.randn(16, 256, dtype=dtype)
        with torch.no_grad():
            # Cut weights are dequantized in their dtype, in whatever dtype whole ones are.
            expected_up = F.linear(x, up.linear.weight.dequantize(dtype))
            expected = down(expected_up)
        torchao_testing.TorchAOTensorParallelTestCase.colwise_shard(up, mesh)
        torchao_testing.TorchAOTensorParallelTestCase.rowwise_shard(down, mesh)
        replicated = DTensor.from_local(x, mesh, [Replicate()])
        for compiled in [False, True] if dtype == torch.bfloat16 else [False]:
            first, second = (torch.compile(m) if compiled else m for m in (up, down))
            with torch.no_grad():
                y = first(replicated)
                assert y.placements == (Shard(1),)
                torch.testing.assert_close(y.full_tensor(), expected_up)
                tolerance = {"rtol": 2e-2, "atol": 2e-2 * float(expected.abs().max())}
                torch.testing.assert_close(second(y).full_tensor(), expected, **tolerance)

    def check_distribute_tensor(self, mesh):
        torch.manual_seed(5)
        weight = GrinqhTensor.from_hp(torch.randn(256, 128))
        x = torch.randn(12, 128)
        for dim in (0, 1):
            cut = distribute_tensor(weight, mesh, [Shard(dim)], src_data_rank=None)
            local = cut.to_local()
            assert isinstance(local, GrinqhTensor)
            step = weight.shape[dim] // self.world_size
            assert torch.equal(local, weight.narrow(dim, step * self.rank, step))
            y = F.linear(DTensor.from_local(x, mesh, [Replicate()]), cut)
            torch.testing.assert_close(y.full_tensor(), F.linear(x, weight))

    def check_what_cannot_be_cut(self, mesh):
        weight = GrinqhTensor.from_hp(torch.randn(96 * self.world_size, 40))
        with pytest.raises(ValueError, match=r"outputs .* of .*: expected a cut between groups"):
            distribute_tensor(weight, mesh, [Shard(0)], src_data_rank=None)

    def check_fully_shard(self, mesh):
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(256, 512, bias=False), nn.Linear(512, 256))
        quantize_(model, GrinqhConfig(bits=3))
        whole = [layer.weight.slices.numel() for layer in model]
        inputs = torch.randn(1, 256), torch.randn(20, 256)
        with torch.no_grad():
            expected = [model(x) for x in inputs]
            for layer in model:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            for _ in range(2):  # the second time into the memory of the first
                for x, y in zip(inputs, expected, strict=True):
                    torch.testing.assert_close(model(x), y)
                for layer, size in zip(model, whole, strict=True):
                    layer.reshard()
                    mine = layer.weight.to_local()
                    assert isinstance(mine, GrinqhTensor)
                    assert mine.slices.numel() * self.world_size == size
        uneven = nn.Linear(40, 96 * self.world_size)
        quantize_(uneven, GrinqhConfig())
        with pytest.raises(ValueError, match=r"outputs .* of .*: expected a cut between groups"):
            fully_shard(uneven, mesh=mesh)

    def check_fully_shard_of_a_model_with_whole_weights(self, mesh):
        model = tiny_model("llama", tied=False)
        quantize_(model, GrinqhConfig(bits=3))
        ids = torch.arange(5, 25)[None]
        with torch.no_grad():
            expected = [model(ids).logits, model(ids[:, :1]).logits]
        ignored = {p for p in model.parameters() if isinstance(p, GrinqhTensor)}
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh, ignored_params=ignored)
        assert isinstance(model.model.embed_tokens.weight, DTensor)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, expected[0])
            assert torch.equal(model(ids[:, :1]).logits, expected[1])


class FourRanks(TwoRanks):
    world_size = 4
