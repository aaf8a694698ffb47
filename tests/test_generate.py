"""`python -m mlxtp.generate` as people start it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import mlx_lm
import pytest
from mlx_lm.generate import setup_arg_parser
from mlx_lm.sample_utils import make_sampler
from pyramid import sweep
from ranks import mpirun
from reference import MODELS, heads
from tiny import VOCABULARY, Tiny

from mlxtp import job_options, options
from mlxtp.generation.sampling import seeded
from mlxtp.stories import PATH as STORIES

pytestmark = pytest.mark.once

# Less than pytest's own limit, which would leave the ranks running.
TIMEOUT_SECONDS = 100
MLX_LM = [sys.executable, "-m", "mlx_lm"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "model"
    path.mkdir()
    Tiny(heads(8, 2, head_dim=32)).save(path)
    return path


def generate(
    ranks: int, *arguments: object, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    program = ["-n", ranks, sys.executable, "-m", "mlxtp.generate"]
    return mpirun(*program, *arguments, stdin=stdin, timeout_seconds=TIMEOUT_SECONDS)


def tokens(done: subprocess.CompletedProcess[str]) -> list[int]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["tokens"]


def one_process(folder: Path, prompt: str, **options: object) -> list[int]:
    model, tokenizer = mlx_lm.load(str(folder))
    responses = mlx_lm.stream_generate(model, tokenizer, prompt, **options)
    return [response.token for response in responses]


def test_the_shipped_model_on_five_ranks() -> None:
    arguments = ["--prompt", "One day a girl named Mia", "--max-tokens", "40", "--json"]
    done = generate(5, *arguments)
    assert tokens(done) == one_process(STORIES, arguments[1], max_tokens=40)
    report = json.loads(done.stdout)
    assert report["world_size"] == 5
    assert report["generation_tokens"] == len(report["tokens"])
    assert (
        0 < report["peak_memory_gb"]["smallest"] <= report["peak_memory_gb"]["largest"]
    )
    assert 0 < report["collectives_share"] < 1


@pytest.mark.slow
def test_what_is_shown(folder: Path) -> None:
    model = ["--model", folder, "--prompt", "abc", "--max-tokens", "8"]
    text = json.loads(generate(3, *model, "--json").stdout)["text"]
    assert generate(3, *model, "--quiet").stdout == text + "\n"
    shown = generate(3, *model)
    assert shown.stdout.count(text) == 1
    for figure in ("Prompt: 3 tokens", "Generation: 8 tokens", "Peak", "Collectives: "):
        assert shown.stdout.count(figure) == 1
    assert "Loading" in shown.stderr


@pytest.mark.slow
def test_how_arrays_travel_is_shown_when_asked_for() -> None:
    plain = ["--max-tokens", "2"]
    shown = generate(2, *plain, "--verbose").stdout
    over = "2 ranks over MPI, in MLX's graph\n"
    assert shown.startswith(f"{over}allreduce, ms")
    assert "direct-one-shot" in shown and "taken: " in shown
    fixed = generate(2, *plain, "--verbose", "--allreduce", "ring-one-shot").stdout
    assert fixed.startswith(
        "2 ranks over MPI, in MLX's graph\nallreduce: direct-one-shot\n"
    )
    in_graph = generate(2, *plain, "--verbose", "--transport", "ring").stdout
    assert in_graph.startswith(
        "2 ranks over MLX's ring\nallreduce: gathers in the graph"
    )
    assert "Collectives: in the graph, not timed" in in_graph
    assert "ranks over" not in generate(2, *plain).stdout


@pytest.mark.slow
def test_eight_bits_on_the_wire() -> None:
    """They are used: the numbers differ; and do no harm: most tokens do not."""
    arguments = ["--max-tokens", "40", "--json"]
    exact = json.loads(generate(2, *arguments).stdout)["tokens"]
    rounded = json.loads(generate(2, *arguments, "--wire", "int8").stdout)["tokens"]
    assert exact[:5] == rounded[:5]


def started(
    *arguments: object, ranks: int = 3, stdin: bytes = b"", pause_seconds: float = 0
) -> subprocess.CompletedProcess[str]:
    """Start the ranks with --ranks; standard input comes in two parts."""
    command = [sys.executable, "-m", "mlxtp.generate", "--ranks", ranks, *arguments]
    job = subprocess.Popen(
        list(map(str, command)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert job.stdin is not None
    half = len(stdin) // 2
    job.stdin.write(stdin[:half])
    job.stdin.flush()
    time.sleep(pause_seconds)
    said = job.communicate(stdin[half:], timeout=TIMEOUT_SECONDS)
    return subprocess.CompletedProcess(
        command, job.returncode, *map(bytes.decode, said)
    )


def test_the_prompt_from_standard_input_is_whole(folder: Path) -> None:
    """Its end comes late, and there is in it what might be taken for the end."""
    options = ["--model", folder, "--max-tokens", "8", "--json"]
    prompt = "ab\x04c\x00d\r\n\u00fc" + 300 * "xyz"
    expected = one_process(folder, prompt.replace("\r\n", "\n"), max_tokens=8)
    given = {"stdin": prompt.encode(), "pause_seconds": 2.5}
    assert tokens(started(*options, "--prompt", "-", **given)) == expected


@pytest.mark.slow
def test_the_prompt_from_standard_input_in_one_process(folder: Path) -> None:
    model = ["--model", folder, "--max-tokens", "8", "--json"]
    expected = one_process(folder, "abc", max_tokens=8)
    assert tokens(started(*model, "--prompt", "-", stdin=b"abc", ranks=1)) == expected
    for given, status in (("abc", 0), ("", 2), ("abc\xff", 2)):
        done = subprocess.run(
            [sys.executable, "-m", "mlxtp.generate", *map(str, model), "--prompt", "-"],
            input=given.encode("latin-1"),
            capture_output=True,
        )
        assert done.returncode == status, done.stderr
        assert status == 0 or done.stderr.count(b"\n") == 1, done.stderr
        assert status == 2 or json.loads(done.stdout)["tokens"] == expected


@pytest.mark.parametrize("prompt", ["--", "-", "-abc", "--story", ":"])
def test_words_that_argparse_takes_for_its_own(prompt: str) -> None:
    for words in (["--prompt", prompt], [f"--prompt={prompt}"], ["-p", prompt]):
        if words != ["--prompt", "-"]:
            assert options.parse(options.with_texts(words)).prompt == prompt


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [":", "--", "-abc", "a\nb;c'd\"e%f", "--story"])
def test_what_a_prompt_may_be(prompt: str, folder: Path) -> None:
    """Words that mpirun, argparse or a shell might take for their own."""
    options = ["--model", folder, "--max-tokens", "8", "--json"]
    done = started(*options, "--prompt", prompt)
    assert tokens(done) == one_process(folder, prompt, max_tokens=8)


def test_equals_mlx_lm_with_the_same_options(folder: Path) -> None:
    """Its sampler draws by seed and position on both sides."""
    arguments = f"--model {folder} --prompt abc --max-tokens 16 --seed 5 --temp 0.8"
    arguments += " --top-p 0.9 --min-p 0.01 --top-k 50 --xtc-probability 0.3"
    arguments += " --kv-bits 8 --kv-group-size 32 --quantized-kv-start 4"
    cache = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 4}
    ends = [VOCABULARY - 1]
    sampler = make_sampler(
        0.8, 0.9, 0.01, top_k=50, xtc_probability=0.3, xtc_special_tokens=ends
    )
    by_position = seeded({"sampler": sampler}, seed=5, start=3)
    expected = one_process(folder, "abc", max_tokens=16, **cache, **by_position)
    assert tokens(generate(3, *arguments.split(), "--json")) == expected


@pytest.mark.slow
def test_draft_model_and_rotating_cache(folder: Path, tmp_path: Path) -> None:
    MODELS["llama-8-4-tied"].save(tmp_path)
    model = ["--model", folder, "--prompt", "abcdef", "--max-tokens", "16", "--json"]
    plain = tokens(generate(2, *model))
    drafted = [*model, "--draft-model", tmp_path]
    for how in ([], ["--draft-rank", "1"], ["--draft", "all"], ["--draft", "split"]):
        assert tokens(generate(2, *drafted, *how, "--num-draft-tokens", "3")) == plain
    assert tokens(generate(2, *model, "--draft-model", "ngram")) == plain
    rotated = tokens(generate(2, *model, "--max-kv-size", "5"))
    assert rotated == one_process(folder, "abcdef", max_tokens=16, max_kv_size=5)


@pytest.mark.slow
def test_prompt_cache(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "cache.safetensors"
    cache = [*MLX_LM, "cache_prompt", "--model", str(folder)]
    cache += ["--prompt", "abc", "--prompt-cache-file", str(file)]
    subprocess.run(cache, check=True, capture_output=True)
    arguments = f"--prompt-cache-file {file} --prompt def --max-tokens 16".split()
    alone = subprocess.run(
        [*MLX_LM, "generate", *arguments, "--verbose", "False"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert generate(3, *arguments, "--quiet").stdout == alone.stdout
    other = generate(2, *arguments, "--model", STORIES)
    assert_one_message(other, "the prompt cache is of")


def assert_one_message(
    done: subprocess.CompletedProcess[str], message: str, lines: int = 1
) -> None:
    """And nothing else on standard error, or so many lines with it."""
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == lines, done.stderr
    assert done.stderr.splitlines()[-1].startswith("mlxtp.generate: error: ")
    assert message in done.stderr.splitlines()[-1]
    assert done.stdout == ""


# One of each kind: seen before the ranks connect, as they do, before a weight is read,
# and with the model. The others are in test_generate_mistakes.py.
MISTAKES: dict[str, tuple[list[str], str]] = {
    "out of range": (["--temp", "-1"], "--temp is -1.0: wanted at least 0"),
    "too many ranks": (["--model", "FEW HEADS"], "start at most 1 ranks"),
    "shares of another world": (["--shares", "1,1,1"], "for each of 2 ranks"),
}


@pytest.mark.parametrize("mistake", sweep(MISTAKES, ["out of range", "too many ranks"]))
def test_mistakes(mistake: str, tmp_path: Path) -> None:
    arguments, message = MISTAKES[mistake]
    models = {"FEW HEADS": Tiny(heads(1, 1))}
    for name in models.keys() & set(arguments):
        models[name].save(tmp_path)
        arguments = [str(tmp_path) if word == name else word for word in arguments]
    begin = time.monotonic()
    assert_one_message(generate(2, *arguments), message)
    assert time.monotonic() - begin < 60


def test_under_mpirun_standard_input_has_no_end() -> None:
    """It is refused at once; what has started the ranks itself says how long it is."""
    done = generate(2, "--prompt", "-", "--model", "./nowhere", stdin="abc")
    assert_one_message(done, "--prompt -: under mpirun standard input has no end; give")
    assert "--prompt-file FILE" in done.stderr


@pytest.mark.slow
def test_the_prompt_from_standard_input_may_be_empty() -> None:
    done = started("--prompt", "-")  # mpirun's line comes first
    assert_one_message(done, "standard input is empty: wanted some", lines=2)


def test_a_full_disk_behind_standard_output() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    command = [sys.executable, "-m", "mlxtp.generate", "--max-tokens", "2", "--quiet"]
    with full.open("w") as stdout:
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    says = (
        "mlxtp.generate: error: cannot write standard output: No space left on device"
    )
    assert done.stderr == f"{says}\n"


def test_help_is_shown_once() -> None:
    done = generate(3, "--help")
    assert done.returncode == 0
    assert done.stdout.count("usage: python -m mlxtp.generate") == 1


@pytest.mark.slow
def test_slices_that_do_not_fit_in_memory(tmp_path: Path) -> None:
    """A checkpoint of 4 TB: a sparse file that nothing reads."""
    Tiny().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    hidden, layers = 1 << 17, 20
    config |= {"hidden_size": hidden, "num_hidden_layers": layers}
    config |= {"intermediate_size": hidden, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors.index.json").unlink()
    shapes: dict[str, list[int]] = {
        "model.embed_tokens.weight": [config["vocab_size"], hidden],
        "model.norm.weight": [hidden],
    }
    wide = 8 * config["head_dim"]
    for layer in range(layers):
        block = f"model.layers.{layer}"
        shapes |= {
            f"{block}.self_attn.q_proj.weight": [wide, hidden],
            f"{block}.self_attn.k_proj.weight": [wide // 4, hidden],
            f"{block}.self_attn.v_proj.weight": [wide // 4, hidden],
            f"{block}.self_attn.o_proj.weight": [hidden, wide],
            f"{block}.mlp.gate_proj.weight": [hidden, hidden],
            f"{block}.mlp.up_proj.weight": [hidden, hidden],
            f"{block}.mlp.down_proj.weight": [hidden, hidden],
            f"{block}.input_layernorm.weight": [hidden],
            f"{block}.post_attention_layernorm.weight": [hidden],
        }
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    try:
        with open(tmp_path / "model.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
    except OSError:
        pytest.skip("this file system takes no sparse file of such a size")
    done = generate(2, "--model", str(tmp_path))
    assert_one_message(done, "GB free: use more hosts")


@pytest.mark.slow
def test_ranks_that_start_differently() -> None:
    program = [sys.executable, "-m", "mlxtp.generate", "--max-tokens"]
    one_each = ["-n", 1, *program, 3, ":", "-n", 1, *program, 4]
    done = mpirun(*one_each, timeout_seconds=TIMEOUT_SECONDS)
    assert_one_message(done, "arguments '--max-tokens 3' on rank 0")


def test_every_option_of_mlx_lm_is_known() -> None:
    """An mlx-lm that brings an option makes this fail: take it, or refuse it."""
    theirs = {action.dest for action in setup_arg_parser()._actions}
    known = {*options.LIMITS, *job_options.LIMITS, *options.REFUSED}
    known |= {"help", "verbose", "model"}
    known |= {"trust_remote_code", "adapter_path", "extra_eos_token", "system_prompt"}
    known |= {"prefill_response", "ignore_chat_template", "use_default_chat_template"}
    known |= {"chat_template_config", "prompt_cache_file", "draft_model"}
    assert theirs <= known


@pytest.mark.parametrize("name", [*job_options.LIMITS, *options.LIMITS])
def test_limits(name: str) -> None:
    args = options.parse([])
    options.check(args)
    texts = {"prompt": " ", "model": " ", "draft_model": " "}
    texts |= dict.fromkeys(("system_prompt", "prefill_response"), "\udcff")
    setattr(args, name, texts.get(name, -3))
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} is .*: wanted"):
        options.check(args)


@pytest.mark.slow
def test_seeds_are_rank_0s(folder: Path) -> None:
    arguments = ["--model", folder, "--prompt", "abc", "--temp", "1.5", "--json"]
    first, second = (tokens(generate(3, *arguments)) for _ in range(2))
    assert first != second
