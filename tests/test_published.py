"""Published tuners: read in both containers, refused without running anything, used with their embedding budget."""

import builtins
import io
import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import seeded, tiny_llama, tiny_opt, tiny_phi3
from torch import Tensor, nn

from zotuner import pickled
from zotuner.blocks import find_blocks
from zotuner.card import CARD
from zotuner.cli import main
from zotuner.config import MetaTrainConfig
from zotuner.errors import ZotunerError
from zotuner.meta import MetaTrainer
from zotuner.models import load_model, weights_sha256
from zotuner.optim import ZOFineTuner
from zotuner.optim.zo_finetuner import features_of
from zotuner.pertnn import FEATURES
from zotuner.pickled import Evaluation, Limits
from zotuner.pth import read_pth
from zotuner.published import INPUTS, import_tuner, limits, read_nets
from zotuner.tuner import DESCRIPTION, WEIGHTS, Tuner
from zotuner.tuner_out import claimed

Nets = dict[str, Any]
CONTAINERS = ("zip", "legacy")


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 1)).to(dtype)


def nets_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> Nets:
    """Fresh nets, as the published code makes them."""
    return seeded(lambda: {name: net(dtype) for name, _ in model.named_parameters()})


def save(content: object, path: Path, container: str = "zip", **options: Any) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=container == "zip", **options)
    return path


def read(path: Path, model: nn.Module | None = None) -> Tensor:
    """All first layers of the nets in a file, as the bank has them."""
    model = model or tiny()
    saved = read_pth(path, limits(len(list(model.named_parameters()))))
    return read_nets(saved, model, find_blocks(model))[0].w1


def tiny() -> nn.Module:
    """A model of three blocks."""
    return nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 3))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The nets of `tiny()`."""
    return save(nets_of(tiny()), tmp_path / "nets.pth")


def import_refused(path: Path, base: Path, *parts: str) -> str:
    """Why a file is not imported: one line that names the file and holds `parts`."""
    with pytest.raises(ZotunerError) as caught:
        import_tuner(path, base)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert message.isprintable()
    for part in parts:
        assert part in message
    return message


def refused(path: Path, *parts: str, nets: int = 3) -> str:
    """Why a file is not read."""
    with pytest.raises(ZotunerError) as caught:
        read_pth(path, limits(nets))
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert len(message) < len(str(path)) + 300
    for part in parts:
        assert part in message
    return message


def base_of(folder: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# What a file says


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("container", CONTAINERS)
def test_an_imported_tuner_answers_as_the_published_nets(
    container: str, dtype: torch.dtype, model_dir: Path, tmp_path: Path
) -> None:
    model, _ = load_model(model_dir)
    nets = nets_of(model, dtype)
    tuner = import_tuner(save(nets, tmp_path / "nets.pth", container), model_dir).tuner
    raw = torch.rand(len(nets), len(FEATURES), generator=torch.Generator().manual_seed(1))
    seen = raw[:, [FEATURES.index(name) for name in INPUTS]]
    expected = torch.stack([nets[name].float()(x).abs() for name, x in zip(tuner.block_names, seen, strict=True)])
    torch.testing.assert_close(tuner.scales(raw), expected.detach()[:, 0], rtol=1e-5, atol=1e-6)
    assert expected.std() > 0.05


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("container", CONTAINERS)
def test_every_binary_protocol_is_read(container: str, protocol: int, tmp_path: Path) -> None:
    nets = nets_of(tiny())
    w1 = read(save(nets, tmp_path / "nets.pth", container, pickle_protocol=protocol))
    expected = torch.stack([layers[0].weight.detach() for layers in nets.values()])
    assert torch.equal(w1[:, :, [FEATURES.index(name) for name in INPUTS]], expected)


def test_big_endian_files_are_read(path: Path) -> None:
    expected = read(path).clone()
    swap = {name: np.frombuffer(data, ">i4").astype("<i4").tobytes() for name, data in storages(path).items()}
    rewrite(path, lambda entries: entries.update(swap, **{"nets/byteorder": b"big"}))
    assert torch.equal(read(path), expected)


def test_a_zip_without_a_byte_order_is_little_endian(path: Path) -> None:
    expected = read(path).clone()
    rewrite(path, lambda entries: entries.pop("nets/byteorder"))
    assert torch.equal(read(path), expected)


@pytest.mark.parametrize("container", CONTAINERS)
def test_names_may_share_a_net_and_tensors_a_storage(container: str, tmp_path: Path) -> None:
    nets = nets_of(tiny())
    nets["1.bias"] = nets["1.weight"]
    flat = torch.arange(700.0) / 700
    nets["0.weight"][0].weight = nn.Parameter(flat[3 : 3 + 320].view(5, 64).T)  # strided, with an offset
    nets["0.weight"][2].weight = nn.Parameter(flat[600:664].view(1, 64))
    w1 = read(save(nets, tmp_path / "nets.pth", container))
    assert torch.equal(w1[1], w1[2])
    assert torch.equal(w1[0][:, FEATURES.index("mean")], flat[3:67])


def test_nets_of_older_versions_keep_their_parameters_in_ordered_dicts(path: Path) -> None:
    expected = read(path).clone()
    nets = nets_of(tiny())
    for layers in nets.values():
        for module in layers.modules():
            vars(module).update(
                _parameters=OrderedDict(module._parameters),
                _modules=OrderedDict(module._modules),
                _buffers=OrderedDict(),
            )
    save(nets, path)
    assert torch.equal(read(path), expected)


def test_names_met_through_a_wrapper_are_matched(path: Path) -> None:
    expected = read(path).clone()
    save({f"module._orig_mod.{name}": n for name, n in nets_of(tiny()).items()}, path)
    assert torch.equal(read(path), expected)


# What asks for more than nets


class Reduced:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def write_mark(path: str) -> None:
    """What must not run."""
    Path(path).write_text("it ran")


def global_of(function: Any) -> str:
    return f"{function.__module__}.{function.__name__}"


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("container", [*CONTAINERS, "pickle"])
@pytest.mark.parametrize("function", [os.system, builtins.eval, builtins.exec, write_mark, os.mkdir, torch.save])
def test_a_pickle_that_calls_something_is_refused_before_it_runs(
    function: Any, container: str, protocol: int, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    arguments = {os.system: f"touch {mark}", builtins.eval: f"open({str(mark)!r}, 'w')"}
    arguments[builtins.exec] = arguments[builtins.eval]
    content = {**nets_of(tiny()), "evil": Reduced(function, arguments.get(function, str(mark)))}
    path = tmp_path / "nets.pth"
    if container == "pickle":
        path.write_bytes(pickle.dumps(content["evil"], protocol))
    else:
        save(content, path, container, pickle_protocol=protocol)
    name = global_of(function)
    if protocol == 2:
        name = name.replace("builtins", "__builtin__")
    refused(path, f"its pickle asks for {name}", "nothing of the file was run")
    assert not mark.exists()


def test_the_calls_of_these_tests_would_leave_a_mark(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Reduced(write_mark, str(tmp_path / "mark"))))
    assert (tmp_path / "mark").read_text() == "it ran"


@pytest.mark.parametrize(
    "layer",
    [
        nn.ReLU(),
        nn.LazyLinear(3),
        nn.Conv1d(1, 1, 1),
        nn.ModuleDict(),
        torch.zeros(1).to_sparse(),
        torch.ones(1).long(),
    ],
    ids=lambda layer: type(layer).__name__,
)
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_other_objects_of_torch_are_refused(layer: Any, container: str, tmp_path: Path) -> None:
    refused(save({"0.weight": layer}, tmp_path / "nets.pth", container), "torch", "nothing of the file was run")


NET = b"ctorch.nn.modules.container\nSequential\n"
ORDERED = b"ccollections\nOrderedDict\n"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"


@pytest.mark.parametrize(
    ("opcodes", "says"),
    [
        (NET + b"N}X\x01\x00\x00\x00aK\x01s\x86b.", "sets attributes of an object that is no net"),
        (NET + b")R.", "calls what is not to be called"),
        (ORDERED + b")R)R.", "calls what is not to be called"),
        (ORDERED + b")\x81.", "makes an object that is no net"),
        (NET + b"K\x01\x85\x81.", "makes an object that is no net"),
        (NET + b")\x81K\x01b.", "sets attributes of an object that is no net"),
        (ORDERED + b")R}b.", "sets attributes of an object that is no net"),
        (b"}K\x01K\x02s.", "strings for keys"),
        (b"}))s.", "strings for keys"),
        (
            b"(X\x07\x00\x00\x00storage" + NET + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x05tQ.",
            "expected 16- or 32-bit",
        ),
        (b"X\x01\x00\x00\x00aQ.", "refers to something that is no storage"),
        (b"K\x01Q.", "refers to something that is no storage"),
        (b"Pabc\n.", "its pickle uses PERSID"),
        (b"(" + NET + b"o.", "its pickle uses OBJ"),
        (b"(icollections\nOrderedDict\n.", "its pickle uses INST"),
        (b"\x82\x01.", "its pickle uses EXT1"),
        (b"I1\n.", "its pickle uses INT"),
        (b"C\x01a.", "its pickle uses SHORT_BINBYTES"),
        (b"K\x012.", "its pickle uses DUP"),
        (b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f.", "expected a whole file"),
        (b"X\xff\xff\xff\x7f.", "expected a whole file"),
        (b"K\x01r\xff\xff\xff\xff.", "it begins otherwise"),
        (TENSOR + b")R.", "expected a whole file"),
        (b"h\x05.", "expected a whole file"),
        (b"t.", "expected a whole file"),
        (b"s.", "expected a whole file"),
        (b"K\x01K\x02a.", "expected a whole file"),
        (b".", "expected a whole file"),
        (b"", "expected a whole file"),
        (b"\xfe.", "expected a whole file"),
    ],
)
def test_opcodes_out_of_place_are_refused(opcodes: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "nets.pth"
    path.write_bytes(b"\x80\x02" + opcodes if opcodes else b"")
    refused(path, says)


def test_a_pickle_changes_nothing_of_what_stands_for_its_names(tmp_path: Path) -> None:
    before = {name: dict(vars(thing)) for name, thing in vars(pickled).items() if isinstance(thing, type)}
    path = tmp_path / "nets.pth"
    path.write_bytes(b"\x80\x02" + NET + b"N}X\x0c\x00\x00\x00__setstate__K\x01s\x86b.")
    refused(path)
    assert {name: dict(vars(thing)) for name, thing in vars(pickled).items() if isinstance(thing, type)} == before


def test_names_out_of_a_file_cannot_write_to_a_terminal(path: Path) -> None:
    save({"0.weight\n\x1b[2J\ud800": 1}, path, pickle_protocol=4)
    saved = read_pth(path, limits(3))
    with pytest.raises(pickled.RefusedError, match="no nets for blocks"):
        read_nets(saved, tiny(), find_blocks(tiny()))
    path.write_bytes(b"\x80\x02cos\x1b[2J\nsys\ttem" + b"x" * 5000 + b"\n.")
    refused(path, r"os\x1b[2J.sys\ttem")


# Damage and lies


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_file_cut_off_anywhere_is_refused(container: str, tmp_path: Path) -> None:
    path = save(nets_of(tiny()), tmp_path / "nets.pth", container)
    whole = path.read_bytes()
    for length in [*range(0, 300, 7), *range(300, len(whole), len(whole) // 150), *range(len(whole) - 40, len(whole))]:
        path.write_bytes(whole[:length])
        refused(path)
    path.write_bytes(whole)
    assert read(path).shape == (3, 64, 5)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_file_changed_anywhere_is_read_or_refused_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "changed"
    folder.mkdir(exist_ok=True)
    container = data.draw(st.sampled_from(CONTAINERS))
    path = folder / f"{container}.pth"
    if not (folder / container).exists():
        save(nets_of(tiny()), folder / container, container)
    changed = bytearray((folder / container).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed) - 1))
        changed[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path.write_bytes(changed)
    try:
        bank, _ = read_nets(read_pth(path, limits(3)), tiny(), find_blocks(tiny()))
    except (ZotunerError, pickled.RefusedError) as error:
        assert str(error).isprintable()  # noqa: PT017
    else:
        assert torch.isfinite(bank.w1).all()


def entries_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def storages(path: Path) -> dict[str, bytes]:
    return {name: data for name, data in entries_of(path).items() if name.startswith("nets/data/")}


def rewrite(path: Path, change: Callable[[dict[str, bytes]], object], compression: int = zipfile.ZIP_STORED) -> None:
    """Changes the entries of a zip."""
    entries = entries_of(path)
    change(entries)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda e: e.update({"nets/data/0": b"\0" * 1276}), "storage 0: expected 1280 bytes, its entry has 1276"),
        (lambda e: e.update({"nets/data/3": b"\0" * 4000}), "storage 3: expected 4 bytes, its entry has 4000"),
        (lambda e: e.pop("nets/data/5"), "nets/data/5"),
        (lambda e: e.pop("nets/data.pkl"), "expected one entry data.pkl"),
        (lambda e: e.update({"more/data.pkl": e["nets/data.pkl"]}), "expected one entry data.pkl"),
        (lambda e: e.update({"nets/byteorder": b"middle"}), "expected little or big"),
        (lambda e: e.update({"nets/data.pkl": e["nets/data.pkl"][:-900]}), "expected a whole file"),
    ],
)
def test_a_zip_whose_entries_do_not_fit_is_refused(path: Path, change: Any, says: str) -> None:
    rewrite(path, change)
    refused(path, says)


def test_a_compressed_zip_is_refused_unread(path: Path) -> None:
    rewrite(path, lambda e: e.update({"nets/bomb": b"\0" * 10_000_000}), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 50_000
    refused(path, "found it compressed")


def test_entries_that_share_their_bytes_cannot_claim_more_than_the_file(path: Path) -> None:
    raw = path.read_bytes()
    at = raw.rfind(b"PK\x05\x06")
    _, _, _, _, count, size, start, _ = struct.unpack("<4s4H2LH", raw[at : at + 22])
    directory = raw[start : start + size]
    copies = b"".join(directory.replace(b"nets/", b"%04d/" % i) for i in range(40))
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 41 * count, 41 * count, 41 * size, start, 0)
    path.write_bytes(raw[:start] + directory + copies + end)
    refused(path, "its entries claim more than")


@pytest.mark.parametrize("field", [20, 24])  # compressed, uncompressed, in the directory's record
@pytest.mark.parametrize("claim", [1, 2**31, 2**32 - 2])
def test_a_directory_that_lies_about_sizes_is_refused(path: Path, field: int, claim: int) -> None:
    raw = bytearray(path.read_bytes())
    at = raw.find(b"PK\x01\x02", raw.rfind(b"nets/data/0") - 60)
    raw[at + field : at + field + 4] = struct.pack("<L", claim)
    path.write_bytes(raw)
    refused(path)


def test_a_damaged_number_is_seen_by_the_checksum(path: Path) -> None:
    raw = path.read_bytes()
    number = storages(path)["nets/data/0"][:4]
    path.write_bytes(raw.replace(number, b"\0\0\0\0"))
    refused(path, "Bad CRC-32")


def test_limits_come_before_reading(path: Path) -> None:
    size = path.stat().st_size
    for limit, says in [
        (Limits(size - 1, 10**6, 10**6), f"expected at most {size - 1} bytes"),
        (Limits(size, 1000, 10**6), "its pickle is longer"),
        (Limits(size, 10**6, 3 * 449 - 1), "more numbers than the nets of this base model"),
    ]:
        with pytest.raises(ZotunerError, match=says):
            read_pth(path, limit)
    assert len(read_pth(path, Limits(size, 10**6, 3 * 449)).content) == 3


def test_a_storage_is_not_made_as_large_as_the_pickle_says(path: Path) -> None:
    swapped = b"M@\x01"  # 320, of the first storage
    huge = b"J\xff\xff\xff\x7f"
    rewrite(path, lambda e: e.update({"nets/data.pkl": e["nets/data.pkl"].replace(swapped, huge, 1)}))
    refused(path, "more numbers than the nets of this base model")


@pytest.mark.parametrize(
    "opcodes",
    [
        b"K\x01r\xff\xff\xff\x7f.",  # memo entry 2^31
        b"\x8d\x00\x00\x00\x00\x01\x00\x00\x00.",  # a text of 4 GiB
        b"\x95\x00\x00\x00\x00\x01\x00\x00\x00.",  # a frame of 4 GiB
        b"}" * 1_000_000,
        b"K\x01q\x00" + b"h\x00" * 400_000 + b".",
    ],
    ids=lambda opcodes: repr(opcodes[:4]),
)
def test_a_pickle_takes_no_more_memory_than_nets_would(opcodes: bytes, tmp_path: Path) -> None:
    path = tmp_path / "nets.pth"
    path.write_bytes(b"\x80\x04" + opcodes)
    tracemalloc.start()
    try:
        refused(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * limits(3).nbytes + 2_000_000


def test_a_tower_of_tuples_is_no_key() -> None:
    """Each is twice the one below: to hash the last would take ages."""
    tower = b"K\x01" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))
    with pytest.raises(pickled.RefusedError, match="strings for keys"):
        Evaluation(limits(1)).run(io.BytesIO(b"\x80\x02}" + tower + b"K\x01s."))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda t: (t.storage, -1, t.size, t.stride), "offset from 0 up"),
        (lambda t: (t.storage, 1, t.size, t.stride), "reaches beyond the 320 numbers"),
        (lambda t: (t.storage, 2**200, t.size, t.stride), "reaches beyond"),
        (lambda t: (t.storage, 0.0, t.size, t.stride), "offset from 0 up"),
        (lambda t: (t.storage, 0, t.size, (-5, 1)), "offset from 0 up"),
        (lambda t: (t.storage, 0, t.size, (2**200, 1)), "reaches beyond"),
        (lambda t: (t.storage, 0, t.size, (5,)), "offset from 0 up"),
        (lambda t: (t.storage, 0, t.size, None), "offset from 0 up"),
        (lambda t: (t.storage, 0, (64, 6), t.stride), "expected a tensor (64, 5), got (64, 6)"),
        (lambda t: (t.storage, 0, (2**62, 2**62), t.stride), "expected a tensor (64, 5), got"),
        (lambda t: (t.storage, 0, [64, 5], t.stride), "got something else"),
        (lambda t: ("storage", 0, t.size, t.stride), "got something else"),
    ],
)
def test_a_tensor_that_leaves_its_storage_is_refused(path: Path, make: Any, says: str) -> None:
    saved = read_pth(path, limits(3))
    record = saved.content["0.weight"].state["_modules"]["0"].state["_parameters"]["weight"]
    assert saved.tensor(record, (64, 5)).shape == (64, 5)
    with pytest.raises(pickled.RefusedError) as caught:
        saved.tensor(pickled.TensorRecord(*make(record)), (64, 5))
    assert says in str(caught.value)


def test_a_stride_that_is_never_taken_may_be_any(path: Path) -> None:
    saved = read_pth(path, limits(3))
    record = saved.content["0.weight"].state["_modules"]["2"].state["_parameters"]["weight"]
    odd = pickled.TensorRecord(record.storage, 0, (1, 64), (2**200, 1))
    assert torch.equal(saved.tensor(odd, (1, 64)), saved.tensor(record, (1, 64)))


# Nets and a base model that do not fit


def changed(nets: Nets, name: str, layer: int, **parameters: Tensor | None) -> Nets:
    for kind, value in parameters.items():
        nets[name][layer]._parameters[kind] = value if value is None else nn.Parameter(value)
    return nets


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda n: n.update({"1.bias": nn.Sequential(nn.Linear(5, 64), nn.Tanh())}), ["1.bias", "got another net"]),
        (lambda n: n.update({"1.bias": nn.Linear(5, 64)}), ["1.bias", "got another net"]),
        (lambda n: n.update({"1.bias": 3}), ["1.bias", "got another net"]),
        (
            lambda n: n.update({"1.bias": nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 1))}),
            ["1.bias: weight of layer 0: expected a tensor (64, 5), got (32, 5)"],
        ),
        (
            lambda n: changed(n, "1.bias", 2, bias=None),
            ["1.bias: bias of layer 2: expected a tensor (1,), got something"],
        ),
        (lambda n: changed(n, "1.bias", 0, bias=torch.ones(64, 1)), ["bias of layer 0", "(64,), got (64, 1)"]),
        (lambda n: changed(n, "1.bias", 2, weight=torch.full((1, 64), torch.nan)), ["weight of layer 2", "finite"]),
        (
            lambda n: changed(n, "0.weight", 0, bias=torch.full((64,), -torch.inf)),
            ["0.weight: bias of layer 0", "finite"],
        ),
        (lambda n: n.pop("1.bias"), ["no nets for blocks of the base model: 1.bias", "2 nets, 3 blocks", "--base"]),
        (lambda n: n.clear(), ["no nets for blocks of the base model: 0.weight, 1.weight, 1.bias"]),
        (lambda n: n.update({"2.weight": n["1.bias"]}), ["nets for unknown parameters: 2.weight", "--base"]),
        (lambda n: n.update({"module.1.bias": n["1.bias"]}), ["1.bias: expected one net, got two"]),
    ],
)
def test_nets_that_do_not_fit_are_refused_by_name(path: Path, change: Any, parts: list[str]) -> None:
    nets = nets_of(tiny())
    change(nets)
    save(nets, path)
    with pytest.raises(pickled.RefusedError) as caught:
        read_nets(read_pth(path, limits(4)), tiny(), find_blocks(tiny()))
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("content", [[net()], net(), torch.ones(3), "text", None, 7])
def test_a_file_that_holds_no_dict_is_refused(path: Path, content: object) -> None:
    save(content, path)
    with pytest.raises(pickled.RefusedError, match="expected a dict from parameter names to nets"):
        read_nets(read_pth(path, limits(3)), tiny(), find_blocks(tiny()))


def test_the_nets_of_a_larger_model_are_refused(path: Path) -> None:
    save(nets_of(tiny_llama()), path)
    refused(path, "is it for another?")


def test_the_parts_of_a_fused_matrix_have_no_published_nets(path: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_phi3(vocab_size=400)
    base = base_of(tmp_path / "phi", model, tokenizer)
    import_refused(save(nets_of(model), path), base, "no nets for blocks", "qkv_proj.weight[q]", "and 3 more")


def test_the_net_of_a_tied_head_is_dropped(path: Path, model_dir: Path) -> None:
    model, _ = load_model(model_dir)
    imported = import_tuner(save({**nets_of(model), "lm_head.weight": net()}, path), model_dir)
    assert imported.dropped == ("lm_head.weight",)
    assert imported.tuner.block_names == tuple(name for name, _ in model.named_parameters())


# The record


def test_an_imported_tuner_says_what_it_is(path: Path, model_dir: Path, tmp_path: Path) -> None:
    model, _ = load_model(model_dir)
    imported = import_tuner(save(nets_of(model), path), model_dir, embedding_rows=240)
    imported.tuner.save_pretrained(tmp_path / "out")
    tuner = Tuner.from_pretrained(tmp_path / "out")
    info = tuner.info
    assert info == imported.tuner.info
    assert (info.base_model, info.base_weights_sha256) == (model_dir.name, weights_sha256(model))
    assert (info.architecture, info.granularity, info.normalized) == ("abs", "block", True)
    assert (info.format_version, info.embedding_rows, info.license) == (1, 240, "unknown")
    assert info.config["imported_from"] == "nets.pth"
    assert tuner.nets_for(find_blocks(model)).tolist() == list(range(len(info.blocks)))
    card = (tmp_path / "out" / CARD).read_text()
    for fact in [
        "imported from nets.pth",
        "on with 240 rows an embedding table",
        info.config["sha256"],
        "license: unknown",
    ]:
        assert fact in card
    assert "meta-trained" not in card


def test_spreads_tell_trained_nets_from_fresh_ones(path: Path, model_dir: Path) -> None:
    model, _ = load_model(model_dir)
    nets = nets_of(model)
    first, second = import_tuner(save(nets, path), model_dir).spreads
    assert (first.default, second.default) == pytest.approx((0.2582, 0.0722), abs=1e-4)
    assert (first.std, second.std) == pytest.approx((first.default, second.default), rel=0.03)
    for layers in nets.values():
        layers[2].weight.data *= 2
    doubled = import_tuner(save(nets, path), model_dir).spreads[1]
    assert doubled.std == pytest.approx(2 * second.std)
    assert str(doubled).endswith(f"PyTorch's default 0.0722 ({doubled.std / second.default - 1:+.1%})")


def test_a_tuner_without_the_option_is_written_as_before(tmp_path: Path) -> None:
    Tuner.for_model(tiny()).save_pretrained(tmp_path)
    assert "embedding_rows" not in json.loads((tmp_path / DESCRIPTION).read_text())
    assert Tuner.from_pretrained(tmp_path).info.embedding_rows is None


@pytest.mark.parametrize("rows", [0, -1, 2.5, 1 << 40])
def test_embedding_rows_that_make_no_sense_are_refused(rows: float, tmp_path: Path) -> None:
    Tuner.for_model(tiny()).save_pretrained(tmp_path)
    info = json.loads((tmp_path / DESCRIPTION).read_text())
    (tmp_path / DESCRIPTION).write_text(json.dumps({**info, "embedding_rows": rows}))
    with pytest.raises(ZotunerError, match="embedding_rows"):
        Tuner.from_pretrained(tmp_path)


# The embedding budget


@pytest.mark.parametrize("build", [tiny_llama, lambda: tiny_llama(tie_word_embeddings=True), tiny_opt])
def test_embedding_tables_count_with_the_rows_given(build: Callable[[], Any]) -> None:
    model = build()
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    blocks = find_blocks(model)
    plain = Tuner.for_model(model).numels_for(model, blocks)
    assert plain.tolist() == [block.numel for block in blocks]
    counted = Tuner.for_model(model, embedding_rows=7).numels_for(model, blocks)
    is_table = torch.tensor([id(block.pieces[0].param) in tables for block in blocks])
    assert counted[is_table].tolist() == [7 * 16] * int(is_table.sum())
    assert torch.equal(counted[~is_table], plain[~is_table])
    assert 0 < int(is_table.sum()) < 3


def test_layers_and_wrapped_models_count_the_same() -> None:
    model = tiny_llama()
    tuner = Tuner.for_model(model, granularity="layer", embedding_rows=7)
    counted = tuner.numels_for(model, find_blocks(model, "layer"))
    assert counted[0] == 7 * 16
    wrapped = nn.DataParallel(model)
    assert torch.equal(tuner.numels_for(wrapped, find_blocks(wrapped, "layer")), counted)


def closure(model: nn.Module) -> Callable[[], Tensor]:
    ids = torch.arange(12).view(2, 6)
    return lambda: model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("rows", [None, 3])
def test_the_optimizer_and_meta_training_keep_one_budget(rows: int | None) -> None:
    model = tiny_llama()
    tuner = Tuner.for_model(model, "abs", seed=3, embedding_rows=rows)
    opt = ZOFineTuner(model, tuner, lr=0.0)
    trainer = MetaTrainer(model, tuner, MetaTrainConfig(model="m", out=Path("o")))
    scales = trainer.scales("copa").detach()
    raw = tuner.scales(features_of(opt.blocks, (0.0, 0.0), [1.0] * len(opt.blocks)))
    opt.step(closure(model))
    assert opt.last is not None
    assert opt.last.scales is not None
    torch.testing.assert_close(scales, opt.last.scales, rtol=1e-12, atol=0)
    d = torch.tensor([block.numel for block in opt.blocks], dtype=torch.float64)
    if rows:
        d[0] = rows * 16
    assert float((d * scales**2).sum()) == pytest.approx(float(d.sum()), rel=1e-12)
    torch.testing.assert_close(scales / scales[0], raw.double() / raw[0].double())


def test_the_budget_changes_the_step_by_one_factor() -> None:
    def scales(rows: int | None) -> Tensor:
        model = tiny_llama()
        opt = ZOFineTuner(model, Tuner.for_model(model, "abs", seed=3, embedding_rows=rows), lr=0.0)
        opt.step(closure(model))
        assert opt.last is not None
        assert opt.last.scales is not None
        return opt.last.scales

    ratio = scales(3) / scales(None)
    assert abs(float(ratio[0]) - 1) > 0.01
    torch.testing.assert_close(ratio, ratio[0].expand(len(ratio)))
    assert torch.equal(scales(64), scales(None))  # the table's own number of rows


# The command line


def call(*argv: str | Path) -> int:
    try:
        return main([str(word) for word in argv])
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 1


def test_the_command_imports_a_file(
    path: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = load_model(model_dir)
    save({**nets_of(model), "lm_head.weight": net()}, path)
    out = tmp_path / "not" / "yet"
    argv = ("tuner", "import", path, "--base", model_dir, "--out", out, "--embedding-rows", "240")
    assert call(*argv) == 0
    text = capsys.readouterr().out
    for part in [f"tuner for 20 blocks of {model_dir.name}", "kB", "count", "240", "lm_head.weight", "default 0.2582"]:
        assert part in text
    assert sorted(file.name for file in out.iterdir()) == sorted([WEIGHTS, DESCRIPTION, CARD])
    opt = ZOFineTuner(model, Tuner.from_pretrained(out), lr=1e-6)
    opt.step(closure(model))
    assert opt.last is not None
    assert not opt.last.skipped
    assert call(*argv) == 2
    assert "holds a tuner; choose another --out, or pass --overwrite" in capsys.readouterr().err
    assert call(*argv[:-2], "--overwrite") == 0
    assert Tuner.from_pretrained(out).info.embedding_rows is None


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["thesis.tex"], "expected an empty folder or a tuner, found other files"),
        ([WEIGHTS], "expected an empty folder or a tuner, found other files"),
        ([WEIGHTS, DESCRIPTION, "config.yaml", "metrics.jsonl"], "expected an empty folder or a tuner"),
    ],
)
def test_a_folder_of_something_else_is_kept(tmp_path: Path, files: list[str], says: str, overwrite: bool) -> None:
    for name in files:
        (tmp_path / name).write_text("mine")
    with pytest.raises(ZotunerError, match=says):
        claim(tmp_path, overwrite)
    with pytest.raises(ZotunerError, match="found a file"):
        claim(tmp_path / files[0], overwrite)
    assert {path.name for path in tmp_path.iterdir()} == set(files)


def claim(out: Path, overwrite: bool) -> None:
    with claimed(out, overwrite):
        raise AssertionError("the folder was to be refused")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["tuner"], "ACTION"),
        (["tuner", "export"], "export"),
        (["tuner", "import"], "FILE"),
        (["tuner", "import", "f.pth", "--out", "o"], "--base"),
        (["tuner", "import", "f.pth", "--base", "m"], "--out"),
        (["tuner", "import", "f.pth", "--base", "m", "--out", "o", "--embedding-rows", "0"], "at least 1"),
        (["tuner", "import", "f.pth", "--base", "m", "--out", "o", "--embedding-rows", "x"], "at least 1"),
        (["tuner", "import", "f.pth", "--base", "m", "--out", "o"], "f.pth: no such file"),
        (["tuner", "import", ".", "--base", "m", "--out", "o"], ".: no such file"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    argv: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("zotuner")
    assert says in line
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_base_and_a_bad_file_are_one_line_each(
    path: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for base, says in [("smolm", "unknown model"), (tmp_path, "no config.json"), (model_dir, "no nets for blocks")]:
        assert call("tuner", "import", path, "--base", base, "--out", tmp_path / "out") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line
    rows = ["--embedding-rows", str(1 << 40)]
    assert call("tuner", "import", path, "--base", model_dir, "--out", tmp_path / "out", *rows) == 2
    assert "embedding rows: expected a number from 1 to" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_of_the_import_names_its_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert call("tuner", "import", "--help") == 0
    text = capsys.readouterr().out
    assert all(flag in text for flag in ["FILE", "--base", "--out", "--embedding-rows", "--overwrite"])
    assert "15 x batch size" in text
