"""The step of `side_by_side` in plain PyTorch."""

import contextlib

from tests import pytorch_net

BATCHES, RATE, MOMENTUM, DECAY = 8, 1e-3, 0.9, 1e-4


def make(depth, batch, dtype, options, device_name):
    """A function from a number of steps to the last loss; the number of parameters; versions.

    The step uses TF32, cuDNN's search for kernels, a fused optimizer, and autocast for bfloat16.
    `options` has none or one of "channels-last", "compiled" and "whole-step graph", a CUDA graph of
    the compiled net's forwards, backwards and update. The last two are channels-last as well.
    """
    import torch
    from torch.nn import functional

    device = torch.device(device_name)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    layout = torch.channels_last if options else torch.contiguous_format
    torch.manual_seed(0)
    net = pytorch_net.make_net(depth).to(device, memory_format=layout).train()
    parameters = sum(p.numel() for p in net.parameters())
    optimizer = torch.optim.SGD(
        net.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY, fused=True
    )
    images = [
        torch.randn(batch, 3, 32, 32).to(device, memory_format=layout) for _ in range(BATCHES)
    ]
    labels = [torch.randint(0, 10, (batch,)).to(device) for _ in range(BATCHES)]
    is_graph = "whole-step graph" in options
    forward = torch.compile(net) if "compiled" in options or is_graph else net

    def cast():
        if dtype == "float32":
            return contextlib.nullcontext()
        # A graph must not hold the casts of weights that it then changes.
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=not is_graph)

    def step(x, y):
        optimizer.zero_grad(set_to_none=True)
        with cast():
            loss = functional.cross_entropy(forward(x).float(), y)
        loss.backward()
        optimizer.step()
        return loss

    if is_graph:
        step = _as_graph(torch, step, images[0], labels[0])

    def run(steps):
        for i in range(steps):
            loss = step(images[i % BATCHES], labels[i % BATCHES])
        if device.type == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return run, parameters, {"torch": torch.__version__, "device": where}


def _as_graph(torch, step, x, y):
    x, y = x.clone(), y.clone()
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(5):
            step(x, y)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(x, y).detach()

    def replay(images, labels):
        x.copy_(images)
        y.copy_(labels)
        graph.replay()
        return loss

    return replay
