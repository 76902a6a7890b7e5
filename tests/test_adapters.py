"""The adapter interface, singular value fine-tuning, its cache, and the saved adapter."""

import functools
import importlib
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from grpocem_jax import adapters
from grpocem_jax.config import load_config
from grpocem_jax.models import base as models
from grpocem_jax.models import gpt2
from grpocem_jax.runs import checkpoints
from grpocem_jax.utils.errors import InputError
from tests.parity import weights
from tests.tiny import SITES

TEXT = weights.tokens(weights.SHAPES["small"], 12)
MASK = np.ones(12, bool)
SVD = adapters.svd
KEY = jax.random.key(0)
svf_module = importlib.import_module("grpocem_jax.adapters.svf")


def rng(seed=0):
    return np.random.default_rng(seed)


def kernel(inputs=6, outputs=10, seed=0):
    return rng(seed).normal(size=(inputs, outputs)).astype(np.float32)


def with_spectrum(*values):
    """A 6 by 10 kernel with the given singular values."""
    u, _, vt = np.linalg.svd(kernel(), full_matrices=False)
    s = np.zeros(6)
    s[: len(values)] = values
    return ((u * s) @ vt).astype(np.float32)


def close(x, y, tolerance=1e-5):
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)


def refused(*fragments):
    """Expects an `InputError` whose message is one sentence that holds every fragment."""
    pattern = "".join(f"(?=.*{fragment})" for fragment in fragments)
    return pytest.raises(InputError, match=rf"^{pattern}[^\n]*\.$")


def stub_svd(kernel):
    """Factors of the right shapes, every singular value 1, without the work."""
    n = min(kernel.shape)
    u, vt = (np.zeros(shape, np.float32) for shape in ((len(kernel), n), (n, kernel.shape[1])))
    return u, np.ones(n, np.float32), vt


@pytest.fixture(scope="module")
def tiny(deep):
    return deep


def adapt(tiny, method, patterns=("attn.c_proj",)):
    """The tiny model with another adapter: model functions, parameters, zero offsets, sites."""
    attached = adapters.attach(tiny.pretrained, method, patterns)
    return attached.model, attached.params, attached.zero, attached.sites


def logits(model, params, offsets):
    run = jax.jit(model.forward)
    return model.logits(params, run(params, offsets, TEXT, MASK))


# The interface.


@pytest.mark.slow
def test_the_report_s_adapter_of_gpt2_124m_has_7368_parameters():
    settings = load_config("gpt2").adapter
    method = adapters.svf(
        rank_ratio=settings.rank_ratio,
        tail=settings.tail,
        min_singular_value=settings.min_singular_value,
        svd=stub_svd,
    )
    config = gpt2.SHAPES["gpt2"]
    sites = adapters.select_sites(gpt2.build(config).sites, settings.sites)
    shapes = jax.eval_shape(functools.partial(gpt2.init_params, config=config), jax.random.key(0))
    params = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes)
    offsets = adapters.init_adapter(
        method, jax.random.key(0), adapters.factor_params(method, params, sites), sites
    )
    assert list(offsets) == sorted(f"h.{i}.attn.c_proj" for i in range(12))
    assert {x.shape for x in offsets.values()} == {(614,)}  # floor(0.8 * 768); rounded up, 615
    assert adapters.num_params(offsets) == 7368


@pytest.mark.slow
def test_no_singular_value_of_a_full_size_kernel_is_below_the_report_s_minimum():
    weight = 0.02 * rng().standard_normal((768, 768), np.float32)
    factors = adapters.svf().factor(KEY, weight)
    assert factors.s.shape == (768,)
    assert adapters.svf().init(KEY, {"site": factors})["site"].shape == (614,)
    close((factors.u * factors.s[None]) @ factors.vt, weight, 1e-6)


@pytest.mark.slow
def test_a_zero_adapter_is_the_base_model(tiny):
    expected = logits(tiny.base, tiny.params, {})
    close(logits(tiny.model, tiny.factored, tiny.zero), expected)
    # A model that could carry an adapter but has none is the base model bit for bit.
    np.testing.assert_array_equal(logits(tiny.model, tiny.params, {}), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sites",
    [
        subset
        for size in range(1, 5)
        for subset in itertools.combinations(SITES, size)
        if size in (1, 4) or subset == ("attn.c_attn", "mlp.c_proj")
    ],
    ids="+".join,
)
def test_any_subset_of_the_projections_can_be_adapted(tiny, sites):
    model, params, zero, paths = adapt(tiny, adapters.svf(), sites)
    assert set(zero) == {f"h.{i}.{site}" for i in range(2) for site in sites}
    # 40 rows or columns in every map of width 40.
    assert adapters.num_params(zero) == 2 * len(sites) * 32
    base = logits(tiny.base, tiny.params, {})
    close(logits(model, params, zero), base)
    random = jax.tree.map(lambda x: rng().normal(0, 0.3, x.shape).astype(np.float32), zero)
    adapted = logits(model, params, random)
    assert np.abs(adapted - base).max() > 0.1
    merged = adapters.merge_params(adapters.svf(), params, random, paths)
    close(logits(tiny.base, merged, {}), adapted)


def test_sites_are_selected_by_their_endings(tiny):
    def select(*patterns):
        return set(adapters.select_sites(tiny.base.sites, patterns))

    attention, wide = ({f"h.{i}.{site}" for i in range(2)} for site in ("attn.c_proj", "mlp.c_fc"))
    assert select("attn.c_proj") == attention
    assert select("attn.c_proj", "mlp.c_fc", "attn.c_proj") == attention | wide
    assert select("h.1.mlp.c_fc") == {"h.1.mlp.c_fc"}
    assert select("c_proj") == attention | {f"h.{i}.mlp.c_proj" for i in range(2)}


@pytest.mark.parametrize("pattern", ["attn.q_proj", "", "proj", "h.2.attn.c_proj", "attn"])
def test_a_site_that_does_not_exist_is_an_error_that_lists_those_there_are(tiny, pattern):
    with refused(f"^sites='{pattern}': is no", *SITES):
        adapters.select_sites(tiny.base.sites, ["attn.c_proj", pattern])


def test_one_name_in_the_place_of_a_list_is_an_error(tiny):
    with refused("^sites='attn.c_proj'", r"use \['attn.c_proj'\]"):
        adapters.select_sites(tiny.base.sites, "attn.c_proj")


def test_no_sites_at_all_is_an_error(tiny):
    with refused("^sites=.*is empty"):
        adapters.select_sites(tiny.base.sites, [])


def test_factoring_leaves_its_input_alone(tiny):
    before = jax.tree.map(np.array, tiny.params)
    factored = adapters.factor_params(tiny.adapter, tiny.params, tiny.sites)
    chex.assert_trees_all_equal(tiny.params, before)
    assert isinstance(factored["h_0"]["attn_c_proj"]["kernel"], adapters.SVFFactors)
    assert factored["h_0"]["mlp_c_fc"] is tiny.params["h_0"]["mlp_c_fc"]
    assert factored["wte"] is tiny.params["wte"]


@pytest.mark.slow
def test_vmap_over_candidates_equals_a_loop(tiny):
    candidates = [tiny.adapted(seed) for seed in range(4)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *candidates)
    run = jax.jit(jax.vmap(tiny.model.forward, (None, 0, None, None)))
    found = tiny.model.logits(tiny.factored, run(tiny.factored, stacked, TEXT, MASK))
    looped = [logits(tiny.model, tiny.factored, candidate) for candidate in candidates]
    close(found, np.array(looped))


def test_vmap_over_candidates_shares_the_factors(tiny):
    """The products with U and V take all candidates at once: two-dimensional weights, no copies."""
    factors = tiny.factored["h_0"]["attn_c_proj"]["kernel"]
    run = jax.vmap(tiny.adapter.apply, (None, 0, None))
    equations = jax.make_jaxpr(run)(factors, jnp.zeros((5, 32)), jnp.zeros((12, 40))).eqns
    products = [
        [v.aval.shape for v in equation.invars]
        for equation in equations
        if equation.primitive.name == "dot_general"
    ]
    # The first does not depend on the candidate and is done once.
    assert products == [[(12, 40), (40, 40)], [(5, 12, 40), (40, 40)]]


@pytest.mark.slow
def test_a_custom_adapter_needs_four_functions_and_no_change_of_the_model(tiny):
    """A trained scale of each output (Liu et al. 2022, arXiv 2205.05638)."""
    scale = adapters.Adapter(
        factor=lambda key, kernel: jnp.asarray(kernel),
        init=adapters.each_site(lambda key, kernel: {"scale": jnp.zeros(kernel.shape[1])}),
        apply=lambda kernel, o, x: models.dense(kernel, x) * (1 + o["scale"])[None],
        merge=lambda kernel, o: kernel * (1 + o["scale"])[None],
    )
    model, params, zero, sites = adapt(tiny, scale, ("attn.c_proj", "mlp.c_fc"))
    assert adapters.num_params(zero) == 2 * (40 + 160)
    base = logits(tiny.base, tiny.params, {})
    close(logits(model, params, zero), base)

    offsets = jax.tree.map(lambda x: rng().normal(0, 0.3, x.shape).astype(np.float32), zero)
    adapted = logits(model, params, offsets)
    merged = adapters.merge_params(scale, params, offsets, sites)
    close(logits(tiny.base, merged, {}), adapted)
    scaled = jax.tree.map(np.array, tiny.params)
    for name, path in sites.items():
        scaled[path[0]][path[1]]["kernel"] *= 1 + offsets[name]["scale"][None]
    close(logits(tiny.base, scaled, {}), adapted)
    assert np.abs(adapted - base).max() > 0.1

    @jax.jit
    @jax.grad
    def gradient(offsets):
        return jnp.sum(model.forward(params, offsets, TEXT, MASK)[:, 0])

    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(gradient(zero)))


# Singular value fine-tuning.


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
@pytest.mark.parametrize("tail", ["keep", "drop"])
def test_offsets_scale_singular_values(shape, tail):
    """y = x U diag(s (1 + o)) V^T, with o = 0 or s = 0 past the k leading ones."""
    method, weight, x = (
        adapters.svf(rank_ratio=0.5, tail=tail),
        kernel(*shape),
        kernel(3, shape[0], 1),
    )
    factors = method.factor(KEY, weight)
    k = min(shape) // 2
    offsets = rng(2).normal(size=k).astype(np.float32)
    assert method.init(KEY, {"site": factors})["site"].shape == (k,)

    u, s, vt = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    scales = np.full(len(s), 1.0 if tail == "keep" else 0.0)
    scales[:k] = 1 + offsets
    expected = sum(scales[i] * s[i] * np.outer(u[:, i], vt[i]) for i in range(len(s)))
    close(method.apply(factors, offsets, x), x @ expected)
    close(method.merge(factors, offsets), expected)
    # Any number of leading axes.
    close(method.apply(factors, offsets, x[:, None]), (x @ expected)[:, None])
    close(method.apply(factors, offsets, x[0]), x[0] @ expected)


def test_tail_drop_at_zero_is_the_best_approximation_of_that_rank():
    weight = with_spectrum(5, 4, 3, 2, 1, 0.5)
    method = adapters.svf(rank_ratio=0.5, tail="drop")
    factors = method.factor(KEY, weight)
    assert factors.u.shape == (6, 3)
    assert factors.vt.shape == (3, 10)
    truncated = method.merge(factors, method.init(KEY, {"site": factors})["site"])
    # Eckart and Young: what is missing has the norm of the dropped singular values.
    assert np.linalg.norm(weight - truncated) == pytest.approx((4 + 1 + 0.25) ** 0.5, abs=1e-5)
    assert np.linalg.matrix_rank(truncated) == 3


def test_factors_are_a_thin_svd_in_float32_descending():
    u, s, vt = adapters.svd(kernel(7, 4))
    assert (u.dtype, s.dtype, vt.dtype) == (np.float32,) * 3
    assert (u.shape, s.shape, vt.shape) == ((7, 4), (4,), (4, 4))
    assert (np.diff(s) <= 0).all()
    close(u.T @ u, np.eye(4), 1e-6)
    close(vt @ vt.T, np.eye(4), 1e-6)
    close((u * s[None]) @ vt, kernel(7, 4), 1e-6)


@pytest.mark.parametrize("tail", ["keep", "drop"])
def test_the_gradient_of_an_offset_is_its_share_of_the_output(tail):
    """For L = sum(c * y): dL/do_i = s_i sum_n (x U)_ni (c V)_ni."""
    method, weight = adapters.svf(rank_ratio=0.5, tail=tail), kernel()
    factors, x, c = method.factor(KEY, weight), kernel(4, 6, 1), kernel(4, 10, 2)
    offsets = jnp.array([0.3, -0.2, 0.1])
    found = jax.grad(lambda o: jnp.sum(c * method.apply(factors, o, x)))(offsets)
    u, s, vt = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    close(found, (s * np.sum((x @ u) * (c @ vt.T), axis=0))[:3])


@pytest.mark.slow
def test_the_gradient_through_the_model_equals_finite_differences(tiny):
    @jax.jit
    def loss(offsets):
        hidden = tiny.model.forward(tiny.factored, offsets, TEXT, MASK)
        found = jax.nn.log_softmax(tiny.model.logits(tiny.factored, hidden))
        return -jnp.mean(jnp.take_along_axis(found[:-1], TEXT[1:, None], axis=-1))

    offsets, direction, step = tiny.adapted(1), tiny.adapted(2, scale=1.0), 1e-2
    ahead = jax.tree.map(lambda a, d: a + step * d, offsets, direction)
    behind = jax.tree.map(lambda a, d: a - step * d, offsets, direction)
    products = jax.tree.map(jnp.vdot, jax.grad(loss)(offsets), direction)
    slope = float(sum(jax.tree.leaves(products)))
    assert abs(slope) > 0.1
    assert (loss(ahead) - loss(behind)) / (2 * step) == pytest.approx(slope, rel=0.01)


@pytest.mark.parametrize(
    ("ratio", "n", "k"),
    [
        (0.8, 768, 614),
        (0.29, 100, 29),  # 0.29 * 100 is 28.999999999999996
        (0.5, 5, 2),
        (0.99, 10, 9),
        (1.0, 10, 10),
        (0.1, 10, 1),
    ],
)
@pytest.mark.parametrize("tail", ["keep", "drop"])
def test_the_number_of_trained_values_is_the_floor_of_the_share(ratio, n, k, tail):
    method = adapters.svf(rank_ratio=ratio, tail=tail, svd=stub_svd)
    factors = method.factor(KEY, np.zeros((n, 2 * n), np.float32))
    assert factors.s.shape == (n if tail == "keep" else k,)
    assert method.init(KEY, {"site": factors})["site"].shape == (k,)


@pytest.mark.parametrize("tail", ["keep", "drop"])
@pytest.mark.parametrize(("minimum", "k"), [(1e-5, 4), (0.01, 3), (0.5, 2), (2.0, 1)])
def test_values_below_the_minimum_are_not_trained(tail, minimum, k):
    method = adapters.svf(rank_ratio=0.8, tail=tail, min_singular_value=minimum)
    factors = method.factor(KEY, with_spectrum(2.5, 1.5, 0.1, 0.005))
    # floor(0.8 * 6) = 4 at most; two of the six values are zero.
    assert method.init(KEY, {"site": factors})["site"].shape == (k,)


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.1, float("nan"), float("inf"), "x"])
def test_a_rank_ratio_outside_its_range_is_an_error(ratio):
    with refused(f"^rank_ratio={ratio!r}", "above 0 and at most 1"):
        adapters.svf(rank_ratio=ratio)


def test_what_cannot_be_attached_is_named(tiny):
    with refused("^adapter=<function svf", "call a function that makes one"):
        adapters.attach(tiny.pretrained, adapters.svf, ["attn.c_proj"])
    for dtype in ("bf16", "int8", object()):
        with refused(f"^dtype={dtype!r}: must be 'float32', 'bfloat16' or 'float16'"):
            adapters.attach(tiny.pretrained, adapters.svf(), ["attn.c_proj"], dtype=dtype)


def test_an_unknown_tail_is_an_error():
    with refused("^tail='cut'", "'keep' or 'drop'"):
        adapters.svf(tail="cut")


@pytest.mark.parametrize("tail", ["keep", "drop"])
@pytest.mark.parametrize("options", [{"rank_ratio": 0.1}, {"min_singular_value": 9.0}])
def test_nothing_to_train_is_an_error(tail, options):
    method = adapters.svf(tail=tail, **options)
    with refused("rank_ratio", "min_singular_value", "no singular value of 6"):
        method.init(KEY, {"site": method.factor(KEY, with_spectrum(2, 1))})


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_in_half_precision_the_adapter_stays_in_float32(dtype):
    method, weight, x = adapters.svf(), kernel(16, 16), kernel(4, 16, 1)
    factors = models.cast_params(method.factor(KEY, weight), dtype)
    assert (factors.u.dtype, factors.s.dtype, factors.vt.dtype) == (dtype, jnp.float32, dtype)
    offsets = jnp.full(12, 0.1)
    found = method.apply(factors, offsets, x)
    assert found.dtype == jnp.float32
    exact = method.apply(method.factor(KEY, weight), offsets, x)
    assert 0 < np.abs(found - exact).max() < 0.02 * np.std(exact) * 4


# The cache of decompositions.


@pytest.fixture
def calls(monkeypatch):
    """Shapes of the kernels that were decomposed."""
    shapes = []

    def counted(kernel):
        shapes.append(kernel.shape)
        return SVD(kernel)

    monkeypatch.setattr(svf_module, "svd", counted)
    return shapes


def assert_factors(found, weight):
    for x, expected in zip(found, SVD(weight), strict=True):
        np.testing.assert_array_equal(x, expected)


def test_a_kernel_is_decomposed_once(tmp_path, calls):
    first = adapters.cached_svd(tmp_path)(kernel())
    second = adapters.cached_svd(tmp_path)(np.asfortranarray(kernel()))
    assert calls == [(6, 10)]
    assert_factors(first, kernel())
    assert_factors(second, kernel())
    (path,) = tmp_path.iterdir()
    assert path.suffix == ".safetensors"


def test_other_weights_and_other_shapes_are_other_entries(tmp_path, calls):
    lookup = adapters.cached_svd(tmp_path)
    lookup(kernel())
    lookup(kernel(seed=1))
    reshaped = kernel().reshape(10, 6)
    assert_factors(lookup(reshaped), reshaped)
    assert calls == [(6, 10), (6, 10), (10, 6)]
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("damage", [lambda b: b[:-8], lambda b: b"", lambda b: b"x" * 99])
def test_a_damaged_entry_is_computed_anew(tmp_path, calls, damage):
    lookup = adapters.cached_svd(tmp_path)
    lookup(kernel())
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert_factors(lookup(kernel()), kernel())
    assert len(calls) == 2
    lookup(kernel())  # the entry is whole again
    assert len(calls) == 2


@pytest.mark.parametrize("change", [{"s": 1.5}, {"u": 0.0}, {"vt": None}])
def test_an_entry_whose_product_is_another_kernel_is_computed_anew(tmp_path, calls, change):
    lookup = adapters.cached_svd(tmp_path)
    lookup(kernel())
    (path,) = tmp_path.iterdir()
    arrays = load_file(path)
    for name, factor in change.items():
        arrays[name] = arrays[name][:, :-1].copy() if factor is None else factor * arrays[name]
    save_file(arrays, path)
    assert_factors(lookup(kernel()), kernel())
    assert len(calls) == 2


def test_a_cache_that_cannot_be_written_to_does_not_matter(tmp_path, calls, monkeypatch):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    lookup = adapters.cached_svd(tmp_path / "file" / "svd")
    assert_factors(lookup(kernel()), kernel())

    def full(*args):
        # What safetensors raises on a full disk or in a read-only folder.
        raise SafetensorError("Error while serializing: I/O error")

    monkeypatch.setattr(svf_module, "write_safetensors", full)
    assert_factors(adapters.cached_svd(tmp_path / "svd")(kernel()), kernel())
    assert len(calls) == 2


def test_the_cache_lies_in_the_user_s_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    adapters.cached_svd()(kernel())
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    adapters.cached_svd()(kernel())
    for root in ("cache", ".cache"):
        assert len(list((tmp_path / root / "grpocem_jax" / "svd").iterdir())) == 1


# The saved adapter.


def test_saved_adapters_load_bit_for_bit(tmp_path, tiny):
    offsets = tiny.adapted()
    checkpoints.save_adapter(tmp_path / "adapter", offsets, {"base_model": "tiny"}, "# Card\n")
    found = checkpoints.load_adapter(tmp_path / "adapter", tiny.zero)
    assert found.keys() == offsets.keys()
    for name, x in found.items():
        assert x.dtype == jnp.float32
        np.testing.assert_array_equal(x, offsets[name])
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name: x.shape for name, x in stored.items()} == {
        "h.0.attn.c_proj": (32,),
        "h.1.attn.c_proj": (32,),
    }
    assert (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8") == "# Card\n"
    assert '"base_model"' in (tmp_path / "adapter" / "adapter_config.json").read_text("utf-8")


def test_paths_may_be_strings(tmp_path, tiny):
    checkpoints.save_adapter(str(tmp_path / "adapter"), tiny.zero, {}, "")
    found = checkpoints.load_adapter(str(tmp_path / "adapter"), tiny.zero)
    np.testing.assert_array_equal(found["h.0.attn.c_proj"], np.zeros(32))
    assert_factors(adapters.cached_svd(str(tmp_path / "svd"))(kernel()), kernel())
    assert len(list((tmp_path / "svd").iterdir())) == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[: len(content) // 2], "cannot be read as safetensors"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "checksum differs"),
    ],
    ids=["cut off", "one bit"],
)
def test_an_adapter_that_is_not_what_was_written_is_named(damage, message, tmp_path, tiny):
    checkpoints.save_adapter(tmp_path, tiny.adapted(), {}, "")
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with refused(str(path), message):
        checkpoints.load_adapter(tmp_path, tiny.zero)


def test_an_adapter_of_another_shape_or_other_sites_is_refused(tmp_path, tiny):
    checkpoints.save_adapter(tmp_path, tiny.adapted(), {}, "")
    longer = tiny.zero | {"h.1.attn.c_proj": jnp.zeros(33)}
    with refused("h.1.attn.c_proj", r"\(32,\)", r"\(33,\)", str(tmp_path)):
        checkpoints.load_adapter(tmp_path, longer)
    with refused("h.0.mlp.c_fc", "None", r"\(32,\)"):
        checkpoints.load_adapter(tmp_path, tiny.zero | {"h.0.mlp.c_fc": jnp.zeros(32)})
    with refused("h.1.attn.c_proj", r"\(32,\)", "None"):
        checkpoints.load_adapter(tmp_path, {"h.0.attn.c_proj": jnp.zeros(32)})


def test_a_folder_without_an_adapter_is_refused(tmp_path, tiny):
    with refused("adapter_model.safetensors", "cannot be read as safetensors"):
        checkpoints.load_adapter(tmp_path, tiny.zero)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x" * 50)
    with refused("adapter_model.safetensors", "cannot be read as safetensors"):
        checkpoints.load_adapter(tmp_path, tiny.zero)


def test_offsets_of_several_arrays_a_site_are_saved_and_read(tmp_path):
    offsets = {
        "h.0.attn.c_proj": {"down": np.arange(6.0).reshape(3, 2), "up": np.ones((2, 3))},
        "h.1.attn.c_proj": {"down": np.zeros((3, 2)), "up": 2 * np.ones((2, 3))},
    }
    checkpoints.save_adapter(tmp_path, offsets, {}, "card")
    template = jax.tree.map(np.zeros_like, offsets)
    loaded = checkpoints.load_adapter(tmp_path, template)
    assert jax.tree.structure(loaded) == jax.tree.structure(offsets)
    for mine, other in zip(jax.tree.leaves(loaded), jax.tree.leaves(offsets), strict=True):
        np.testing.assert_array_equal(mine, other)
