"""The same on CUDA: capture, prefill, and decode inside a CUDA graph, where a host sync is an error."""

from __future__ import annotations

import pytest
import torch

from tests.passes.tiny import Machine, run, same_bits, tiny_model

pytestmark = pytest.mark.gpu

CASES = [
    ("gpt2", torch.float32, 2e-5),
    ("llama", torch.bfloat16, 3e-2),
    ("gemma3", torch.float16, 1e-2),
    ("mixtral", torch.bfloat16, 3e-2),
    ("mixtral", torch.float32, 2e-5),
    ("gpt_oss", torch.float16, 1e-2),
    ("deepseek_v3", torch.bfloat16, 3e-2),
]


@pytest.mark.parametrize(("case", "dtype", "tolerance"), CASES, ids=lambda part: str(part).replace("torch.", ""))
@torch.no_grad()
def test_decode_in_a_cuda_graph_equals_eager(case: str, dtype: torch.dtype, tolerance: float) -> None:
    model = tiny_model(case, dtype=dtype).cuda()
    tokens = torch.randint(3, 250, (2, 30))
    expected = model(tokens.cuda(), use_cache=False).logits
    machine = Machine(model)
    prefill = machine.build((1, 12, 1), "resid_post")
    for row, first, last in ((0, 0, 12), (0, 12, 22), (1, 0, 7)):
        logits = machine.logits(prefill, [(row, first, tokens[row, first:last].tolist())])
        torch.testing.assert_close(logits[0, 0], expected[row, last - 1], atol=tolerance, rtol=0)

    decode = machine.build((2, 1, 1), "resid_post", "rank", 2)
    inputs = machine.env(decode, [(0, 22, [int(tokens[0, 22])]), (1, 7, [int(tokens[1, 7])])])
    direct = run(decode, inputs)["logits"].clone()
    for index, (row, at) in enumerate(((0, 22), (1, 7))):
        torch.testing.assert_close(direct[index, 0], expected[row, at], atol=tolerance, rtol=0)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(decode, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = run(decode, inputs)["logits"]
    static.zero_()
    graph.replay()
    assert same_bits(static, direct)
