"""A task that a YAML file describes: where its tables are, its prompt, and how an answer is judged.

name: reviews                         # default: the file's stem
train: reviews.csv                    # files beside the YAML, or with `hub` the names of its splits
prompt: "{text} It was"               # fields in braces; {{ and }} are braces
candidates: [" terrible", " great"]
label: label                          # the field: 0, 1, ..., or one of `labels`
"""

import string
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from zotuner.config import read_yaml
from zotuner.errors import ZotunerError, unknown
from zotuner.tasks.base import Row, Task, check_metrics
from zotuner.tasks.from_python import load_score
from zotuner.tasks.metrics import METRICS
from zotuner.tasks.scores import Example, Mean, Metric

Texts = Annotated[
    tuple[str, ...], Field(min_length=1), BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
]


class Description(BaseModel):
    """The keys of such a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[\w.-]+$", description="as in results and in --data-dir; default: the file's stem")
    hub: str | None = Field(None, description="repository on the Hub; train, validation and test are its splits then")
    config: str = Field("", description="the repository's configuration, if it has several")
    train: str = Field(description="a file beside this one: .csv, .tsv, .jsonl, .json or .parquet")
    validation: str | None = Field(None, description="likewise; dev comes from here if there is a test too")
    test: str | None = Field(None, description="likewise; default: validation, or a quarter of train at most")
    prompt: str = Field(description="what stands before the answer; {field} is a field of the row")
    candidates: tuple[str, ...] | None = Field(None, min_length=2, description="the answers to choose from; as prompt")
    label: str | None = Field(None, description="field that tells the right candidate: 0, 1, ..., or one of labels")
    labels: tuple[str | int, ...] | None = Field(None, description="values of that field, in the order of candidates")
    suffix: str = Field("", description="what stands behind the candidate, for masked models; as prompt")
    answer: str | None = Field(
        None, description="in place of candidates: the text to generate; as prompt; of a list, each item is right"
    )
    stop: str = Field("\n", min_length=1, description="text at which a generated answer ends")
    max_new_tokens: int = Field(50, ge=1, description="tokens to generate at most")
    metric: Texts | None = Field(
        None,
        description=f"of {', '.join(METRICS)}, or FILE.py:FUNCTION; default: accuracy, of an answer f1 and em",
    )
    loss: Literal["classification", "language-modelling"] | None = Field(
        None, description="default: classification over candidates; language-modelling of an answer"
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool(cls, value: Any) -> Any:
        if any(isinstance(one, bool) for one in (value if isinstance(value, list) else [value])):
            raise PydanticCustomError("bool", "Put yes, no, on, off, true and false in quotes, so that YAML reads text")
        return value

    @field_validator("prompt", "suffix", "answer", "candidates")
    @classmethod
    def _templates(cls, value: Any) -> Any:
        for text in (value,) if isinstance(value, str) else value or ():
            try:
                _parts(text)
            except ValueError as error:
                raise PydanticCustomError("template", "{reason}", {"reason": str(error)}) from None
        return value

    @model_validator(mode="after")
    def _together(self) -> Self:
        if (self.answer is None) == (self.candidates is None):
            raise ValueError("expected either candidates and label, or answer")
        tables = [name for name in (self.train, self.validation, self.test) if name is not None]
        if len(set(tables)) < len(tables):
            raise ValueError(f"train, validation and test: expected different ones, got {', '.join(tables)}")
        if self.config and not self.hub:
            raise ValueError("config goes with hub: it names the repository's configuration")
        if self.candidates is not None and self.label is None:
            raise ValueError("label is required: the field that tells which of the candidates is right")
        if self.answer is not None and (self.label or self.labels or self.suffix or self.loss == "classification"):
            raise ValueError("label, labels, suffix and loss: classification go with candidates, not with answer")
        if self.candidates is not None and len(set(self.candidates)) < len(self.candidates):
            raise ValueError("candidates: expected different texts")
        if self.labels is not None and len({*map(str, self.labels)}) != len(self.candidates or ()):
            raise ValueError(f"labels: expected {len(self.candidates or ())} different values, one a candidate")
        return self


class DescribedTask(Task):
    """A task of a YAML file; each such file makes a subclass.

    Class attributes:
        file: The YAML.
        described: What it says.
        used: (key, field) of all fields that it names.
    """

    file: ClassVar[Path]
    described: ClassVar[Description]
    used: ClassVar[tuple[tuple[str, str], ...]]

    def example(self, row: Row) -> Example:
        """The prompt of the file, and its candidates or the answer that is to be generated."""
        if self.described.answer is not None:
            answers = tuple(_render(self.described.answer, one) for one in self._each_answer(row))
            text = answers[0].removesuffix(self.stop) + self.stop
            return Example(_render(self.described.prompt, row), (text,), 0, tuple(map(str.strip, answers)))
        return Example(_render(self.described.prompt, row), self._candidates(row), self.label(row))

    def masked(self, row: Row) -> Example:
        """The same, with the file's suffix behind the candidate."""
        if self.generates:
            return super().masked(row)
        prompt, suffix = (_render(text, row) for text in (self.described.prompt, self.described.suffix))
        return Example(prompt, self._candidates(row), self.label(row), suffix=suffix)

    def label(self, row: Row) -> int:
        """The number of the right candidate."""
        value = _text(row[str(self.described.label)])
        if self.described.labels is not None:
            return [str(label) for label in self.described.labels].index(value)
        return int(value)

    def _candidates(self, row: Row) -> tuple[str, ...]:
        return tuple(_render(text, row) for text in self.described.candidates or ())

    def _each_answer(self, row: Row) -> list[Row]:
        """The row, once for each item of a list in a field of the answer."""
        lists = self._lists(row)
        return [row | {lists[0]: item} for item in row[lists[0]]] if lists else [row]

    def _lists(self, row: Row) -> list[str]:
        """Fields of the answer that hold several."""
        return [name for name in _fields(str(self.described.answer or "")) if isinstance(row[name], list)]

    def _check(self, row: Row, where: str) -> None:
        for key, name in self.used:
            if name not in row:
                raise ZotunerError(f"{self.file}: {key}: {unknown('field', name, row)} ({where})")
        for key, name in self.used:
            self._check_field(row[name], f"{where}: field {name!r}", key)
        if len(lists := self._lists(row)) > 1:
            raise ZotunerError(f"{where}: expected one field of the answer to be a list, got {', '.join(lists)}")
        if self.generates:
            texts = [_render(str(self.described.answer), one) for one in self._each_answer(row)]
        else:
            texts = list(self._candidates(row))
            self._check_label(_text(row[str(self.described.label)]), where)
        if not all(text.strip() for text in texts):
            raise ZotunerError(f"{where}: expected text for each answer, got {texts}")
        if self.generates and self.stop in texts[0].strip():
            raise ZotunerError(f"{where}: {texts[0]!r} holds {self.stop!r}, at which an answer ends; set another stop")

    def _check_field(self, value: Any, where: str, key: str) -> None:
        values = value if key == "answer" and isinstance(value, list) else [value]
        if not values or None in values:
            raise ZotunerError(f"{where} is empty; {self.file.name} needs it for its {key}")
        for one in values:
            if not isinstance(one, str | int | float):
                raise ZotunerError(f"{where}: expected text or a number, got {str(one)[:60]!r}")

    def _check_label(self, value: str, where: str) -> None:
        labels = [str(label) for label in self.described.labels or range(len(self.described.candidates or ()))]
        if value not in labels:
            hint = "" if self.described.labels else "; labels in the YAML file names other values"
            raise ZotunerError(f"{where}: field {self.described.label!r}: {unknown('label', value, labels)}{hint}")


def described_task(file: Path) -> type[Task]:
    """The task of a YAML file.

    Raises:
        ZotunerError: No YAML mapping, a key that nobody knows, or a value that does not fit; one line.
    """
    stated = read_yaml(file)
    for key in stated:
        if key not in Description.model_fields:
            raise ZotunerError(f"{file}: {unknown('key', str(key), Description.model_fields)}")
    defaults: dict[str, Any] = {"name": file.stem} | ({"train": "train"} if "hub" in stated else {})
    try:
        described = Description.model_validate(defaults | stated)
    except ValidationError as error:
        raise ZotunerError(f"{file}: {_explain(error)}") from None
    metrics = [name.rpartition(":")[2] for name in _metrics(described)]
    check_metrics(f"{file}: metric", metrics)
    splits = {name: getattr(described, name) for name in ("train", "validation", "test") if getattr(described, name)}
    test = next(name for name in ("test", "validation", "train") if name in splits)
    attributes = {
        "__doc__": f"Of {file}.",
        "__module__": __name__,
        "file": file,
        "described": described,
        "used": _used(described),
        "name": described.name,
        "hub": (described.hub, described.config) if described.hub else None,
        "sources": splits,
        "folder": file.parent,
        "fields": {},
        "loss": described.loss or ("language-modelling" if described.answer is not None else "classification"),
        "metrics": {
            short: _metric(name, described, file) for short, name in zip(metrics, _metrics(described), strict=True)
        },
        "generates": described.answer is not None,
        "max_new_tokens": described.max_new_tokens,
        "stop": described.stop,
        "dev_split": "validation" if {"validation", "test"} <= set(splits) else "train",
        "test_split": test,
    }
    return type("DescribedTask", (DescribedTask,), attributes)


def _used(described: Description) -> tuple[tuple[str, str], ...]:
    """(key, field) of all fields that a description names."""
    texts = {"prompt": described.prompt, "suffix": described.suffix, "answer": described.answer or ""}
    texts["candidates"] = "".join(described.candidates or ())
    found = [(key, name) for key, text in texts.items() for name in _fields(text)]
    return (*found, *([("label", described.label)] if described.label is not None else []))


def _metrics(described: Description) -> tuple[str, ...]:
    """The metrics that are asked for, or are usual."""
    return described.metric or (("accuracy",) if described.answer is None else ("f1", "em"))


def _metric(name: str, described: Description, file: Path) -> Metric:
    """A metric by its name, or the mean of a function (answer, example) -> score of a Python file beside the YAML."""
    path, colon, function = name.rpartition(":")
    if colon:
        return Mean(load_score(file.parent / path, function))
    if name not in METRICS:
        raise ZotunerError(f"{file}: metric: {unknown('metric', name, METRICS)}, or FILE.py:FUNCTION")
    if described.answer is not None and not isinstance(METRICS[name], Mean):
        raise ZotunerError(f"{file}: metric: {name} needs candidates, not a generated answer")
    return METRICS[name]


def _explain(error: ValidationError) -> str:
    """The first complaint of pydantic: the key, what was expected, what came."""
    first = error.errors()[0]
    text = str(first["msg"]).removeprefix("Value error, ")
    if not first["loc"]:
        return text
    key = str(first["loc"][0])
    if first["type"] == "missing":
        return f"{key} is required: {Description.model_fields[key].description}"
    quote = "; put it in quotes" if isinstance(first["input"], bool | int | float) and "string" in text else ""
    return f"{key}: {text[0].lower()}{text[1:]}, got {first['input']!r}{quote}"


@cache
def _parts(text: str) -> tuple[tuple[str, str | None], ...]:
    """(literal, field behind it) of a template, in order; ValueError for one that is none."""
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"expected fields in braces, {{{{ and }}}} for braces ({error})") from None
    for _, name, form, conversion in parsed:
        if name == "" or form or conversion:
            raise ValueError("expected the name of a field, and no more, in each pair of braces; {{ and }} are braces")
    return tuple((literal, name) for literal, name, *_ in parsed)


def _fields(text: str) -> list[str]:
    """The fields that a template names."""
    return list(dict.fromkeys(name for _, name in _parts(text) if name is not None))


def _render(text: str, row: Row) -> str:
    return "".join(literal + ("" if name is None else _text(row[name])) for literal, name in _parts(text))


def _text(value: Any) -> str:
    """A value as it is written in JSON, text without quotes."""
    return str(value).lower() if isinstance(value, bool) else str(value)
