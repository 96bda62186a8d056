"""csrc.sigmoid_loss: the definition with all pairs at once, gradients, PyTorch's checks; the kernel on the host. The authors' values of
D-BETA's ETS are in test_golden.py."""
import ctypes

import pytest
import torch
import torch.nn.functional as F

import csrc
from csrc import sigmoid
from test_csrc import compiler, on_host


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).requires_grad_()


def with_all_pairs(x, y, scale, bias, positive):
    sign = 2 * torch.diag(positive).to(x.dtype) - 1
    return F.softplus(-sign * (scale * x @ y.T + bias)).mean()


@pytest.fixture
def in_blocks(monkeypatch):
    monkeypatch.setitem(sigmoid.PAIRS, "cpu", 20)


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_it_is_the_loss_over_all_pairs(in_blocks, size, dtype, tolerance):
    x, y = draw(size, 5, dtype=dtype), draw(size, 5, dtype=dtype, seed=1)
    scale, bias = (torch.tensor(v, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True) for v in (3.0, -2.0))
    positive = torch.arange(size) % 3 != 1
    ours = csrc.sigmoid_loss(x, y, scale, bias, positive)
    exact = [v.detach().double().requires_grad_() for v in (x, y, scale, bias)]
    theirs = with_all_pairs(*exact, positive)
    gradients = torch.autograd.grad(2 * ours, (x, y, scale, bias))
    assert ours.dtype == scale.dtype and abs(ours - theirs) < tolerance
    assert all(g.dtype == v.dtype for g, v in zip(gradients, (x, y, scale, bias)))
    assert all((a - b).abs().max() < tolerance for a, b in zip(gradients, torch.autograd.grad(2 * theirs, exact)))


def test_rows_of_a_batch_make_up_the_whole(in_blocks):
    """The mean of the losses of both halves of x, each against all y, is the loss; so are the gradients."""
    x, y, positive = draw(6, 5), draw(6, 5, seed=1), torch.arange(6) % 3 != 1
    whole = csrc.sigmoid_loss(x, y, 3.0, -2.0, positive)
    halves = [csrc.sigmoid_loss(x[i:i + 3], y, 3.0, -2.0, positive, first=i) for i in (0, 3)]
    assert torch.isclose(sum(halves) / 2, whole, rtol=1e-12)
    for a, b in zip(torch.autograd.grad(sum(halves) / 2, (x, y)), torch.autograd.grad(whole, (x, y))):
        assert torch.allclose(a, b, rtol=1e-10)
    with pytest.raises(ValueError, match="rows of such from 4 on"):
        csrc.sigmoid_loss(x[:3], y, first=4)


def test_without_positive_all_pairs_belong_together():
    x, y = draw(4, 3), draw(4, 3, seed=1)
    assert torch.isclose(csrc.sigmoid_loss(x, y, 2.0), with_all_pairs(x, y, 2.0, 0.0, torch.ones(4, dtype=torch.bool)))


def test_far_from_zero_it_is_exact():
    """A pair that is told with great certainty: softplus(x) - x would be 0 in float32."""
    x = torch.tensor([[30.0]], requires_grad=True)
    loss = csrc.sigmoid_loss(x, torch.ones(1, 1))
    assert loss.item() == pytest.approx(9.357623e-14, rel=1e-5)
    loss.backward()
    assert x.grad.item() == pytest.approx(-9.357623e-14, rel=1e-5)


def test_gradcheck_and_opcheck(in_blocks):
    x, y, scale, bias = draw(5, 3), draw(5, 3, seed=1), draw(1, seed=2)[0], draw(1, seed=3)[0]
    positive = torch.tensor([True, False, True, True, False])
    assert torch.autograd.gradcheck(lambda *v: csrc.sigmoid_loss(*v, positive), (x, y, scale, bias))
    for gradients in (True, False):
        arguments = [v.detach() if not gradients else v for v in (x, y, torch.stack([scale, bias]).detach())]
        torch.library.opcheck(torch.ops.ecg.sigmoid_loss.default, (*arguments, positive, gradients))
    loss = lambda *v: csrc.sigmoid_loss(*v, positive)
    assert torch.allclose(torch.compile(loss, fullgraph=True, backend="aot_eager")(x, y, scale, bias), loss(x, y, scale, bias))


def test_all_pairs_are_never_there():
    x, y = draw(2000, 16, dtype=torch.float32), draw(2000, 16, dtype=torch.float32, seed=1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        csrc.sigmoid_loss(x, y).backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= 4 * sigmoid.PAIRS["cpu"] * 4 < 4 * 2000 * 2000 * 2


def test_no_pairs_no_loss():
    x = torch.zeros(0, 3, requires_grad=True)
    loss = csrc.sigmoid_loss(x, torch.zeros(0, 3))
    loss.backward()
    assert loss == 0 and x.grad.shape == (0, 3)


@pytest.mark.parametrize("arguments, error, words", [
    ((draw(2, 3), draw(3, 3)), ValueError, r"both must be \(B, D\)"),
    ((torch.ones(2, 3, dtype=torch.int64), draw(2, 3)), TypeError, "floating-point"),
    ((draw(2, 3), draw(2, 3), 1.0, 0.0, torch.ones(3, dtype=torch.bool)), ValueError, r"it must be bool \(2,\)"),
])
def test_bad_input_is_explained(arguments, error, words):
    with pytest.raises(error, match=words):
        csrc.sigmoid_loss(*arguments)


@pytest.mark.parametrize("wrong", [dict(y=torch.ones(3, 3)), dict(both=torch.ones(3)),
                                   dict(positive=torch.ones(2)), dict(positive=torch.ones(4).bool())])
def test_a_direct_call_with_other_shapes_is_refused(wrong):
    true = torch.ones(2, dtype=torch.bool)
    good = dict(x=torch.ones(2, 3), y=torch.ones(2, 3), both=torch.ones(2), positive=true)
    with pytest.raises(ValueError, match="they must be"):
        torch.ops.ecg.sigmoid_loss(*{**good, **wrong}.values(), True)


# ---- CUDA, without a GPU ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """csrc/sigmoid_cuda.cu, run on the host: sigmoid.terms, but a row's sums apart, (R, 3)."""
    function = on_host("sigmoid_on_host.cpp", tmp_path_factory.mktemp("kernels")).terms

    def run(scores, first, both, positive, dtype):
        gradient, sums = torch.full(scores.shape, 7.0, dtype=dtype), torch.full((len(scores), 3), 7.0)
        pointer = lambda x: ctypes.c_void_p(x.data_ptr())
        function(pointer(scores), ctypes.c_int64(len(scores)), scores.shape[1], ctypes.c_int64(first), pointer(both), pointer(positive),
                 dtype == torch.bfloat16, pointer(gradient), pointer(sums))
        return gradient, sums
    return run


@compiler
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("rows, columns, first", [(3, 8, 2), (2, 5, 3), (4, 2052, 7), (1, 1, 0)])
def test_kernel_on_the_host_is_the_definition(kernel, rows, columns, first, half):
    scores = 4 * draw(rows, columns, dtype=torch.float32).detach()
    scores[0, first] = 40.0
    both, positive = torch.tensor([1.5, -0.5]), torch.arange(columns) % 3 != 2
    gradient, sums = kernel(scores, first, both, positive, torch.bfloat16 if half else torch.float32)
    expected, expected_sums = sigmoid.terms(scores.double(), first, both.double(), positive, torch.float64)
    assert torch.allclose(gradient.double(), expected, rtol=5e-3 if half else 1e-5, atol=0)
    assert torch.allclose(sums.double().sum(0), expected_sums, rtol=1e-4)
    assert not half or torch.equal(gradient, sigmoid.terms(scores, first, both, positive, torch.bfloat16)[0])


@compiler
def test_nan_shows_in_the_kernels_sums(kernel):
    both, positive = torch.tensor([1.0, 0.0]), torch.ones(2, dtype=torch.bool)
    gradient, sums = kernel(torch.tensor([[1.0, torch.nan]]), 0, both, positive, torch.bfloat16)
    assert sums.isnan().all() and gradient.isnan().tolist() == [[False, True]]
