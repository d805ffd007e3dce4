"""Experiment files: one YAML is the whole definition of an experiment."""

import difflib
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, get_args

import yaml
from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from crnn.errors import SettingsError
from crnn.settings import (
    VGG13,
    BaselineSettings,
    DataSettings,
    ExportSettings,
    ModelSettings,
    QuantizeSettings,
    Settings,
    TeacherSettings,
)
from pruning.settings import FinetuneSettings, PruneSettings, SparseSettings


def _sorted_basis_points(ratios: tuple[float, ...]) -> tuple[float, ...]:
    for ratio in ratios:
        if abs(ratio * 10_000 - round(ratio * 10_000)) > 1e-6:
            raise ValueError(f"a ratio has at most four decimals; {ratio} has more")
    return tuple(sorted({round(ratio, 4) for ratio in ratios}))


def _distinct(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("each seed is given once")
    return seeds


Seed = Annotated[int, Field(ge=0, lt=2**63)]
Seeds = Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(_distinct)]
Ratio = Annotated[float, Field(ge=0, lt=1)]
Ratios = Annotated[tuple[Ratio, ...], AfterValidator(_sorted_basis_points)]


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    labels = all(re.fullmatch(r"[A-Za-z0-9_-]{1,63}", label) for label in host.split("."))
    if not (labels and re.fullmatch(r"[1-9][0-9]{0,4}", port) and int(port) < 2**16):
        raise ValueError("rendezvous is host:port, such as first.example:29400")
    return text


def _matching(pattern: str, rule: str) -> AfterValidator:
    """Text that begins as a pattern does, or a ValueError that states the rule."""

    def check(text: str) -> str:
        if not re.match(pattern, text):
            raise ValueError(rule)
        return text

    return AfterValidator(check)


def _command(text: str) -> str:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"the command's quotes do not match ({error})") from error
    if not words:
        raise ValueError("a command has at least one word")
    return text


STORES = "a store is an address that begins with s3://, gs://, az:// or file://"
WEBHOOKS = "a webhook is an address that begins with http:// or https://"
NAMES = (
    "a name has letters, digits, _ and - alone, begins with a letter or a digit, and is not"
    " Default, which is MLflow's own"
)

LOCAL: Final = "local"


class ExecutionSettings(Settings):
    """How to use the machines. Nothing here changes a result beyond rounding, or a cache key.

    parallel is how many cut networks are trained side by side, and loader_workers how many
    processes prepare the lines of each training.

    Each training is spread over so many processes, each with a share of every batch; on a machine
    with GPUs, one for each of them. Where nodes says so, up to so many machines train together, the
    others by `crnn-slim join`; rendezvous is where they meet, host:port of the one that runs the
    pipeline.

    store is where several machines share finished stages, an address like s3://bucket/prefix; they
    must share a Prefect server as well (PREFECT_API_URL), which lets one at a time compute a stage.

    runner says whose processes compute the stages: this machine's, or those of the workers of a
    cluster of Dask or Ray, whose address is cluster.

    A run that fails, and not by a mistake in its settings or data, is tried again so often, first
    after retry_seconds, then after twice as long, and so on.
    """

    parallel: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    loader_workers: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    processes: Annotated[int, Field(ge=1, le=64)] = 1
    nodes: Annotated[int, Field(ge=1, le=64)] = 1
    rendezvous: Annotated[str, AfterValidator(_address)] | None = None
    store: Annotated[str, _matching(r"(s3|gs|az|file)://.", STORES)] | None = None
    runner: Literal["local", "dask", "ray"] = LOCAL
    cluster: Annotated[str, Field(min_length=1)] | None = None
    retries: Annotated[int, Field(ge=0, le=10)] = 0
    retry_seconds: Annotated[float, Field(gt=0)] = 60

    @model_validator(mode="after")
    def _machines_need_more(self) -> Self:
        if self.runner != LOCAL and not (self.cluster and self.store):
            raise ValueError(
                f"runner: {self.runner} needs cluster, the address of a running one, and store,"
                " where its workers share the stages"
            )
        if self.cluster and self.runner == LOCAL:
            raise ValueError("cluster needs runner: dask or ray, and runner is local")
        if (self.nodes > 1) != (self.rendezvous is not None):
            raise ValueError(
                "nodes, more than one, and rendezvous, host:port of the machine that runs the"
                " pipeline, need each other"
            )
        if self.nodes > 1 and self.runner != LOCAL:
            raise ValueError(f"nodes is for runner: local; {self.runner} has machines of its own")
        return self


class ControlSettings(Settings):
    """Networks to compare with, that get the multiply-adds of the slimming path without slimming.

    Attributes:
        scratch: The architecture of a cut, from fresh weights.
        small: An uncut network with about as many parameters as the cut one.
        ratios: Those of the experiment's ratios that get controls; None: all of them. Targets
            have none.
    """

    scratch: bool = False
    small: bool = False
    ratios: Ratios | None = None

    def kinds(self, ratio: float) -> list[str]:
        """The controls of a ratio, as their stages are named."""
        wanted = self.ratios is None or ratio in self.ratios
        return [kind for kind in ("scratch", "small") if wanted and getattr(self, kind)]


class NotifySettings(Settings):
    """Who is told of a failed run and of a new champion, with a JSON object.

    command gets it on standard input; webhook, an address, by POST.
    """

    command: Annotated[str, AfterValidator(_command)] | None = None
    webhook: Annotated[str, _matching("https?://", WEBHOOKS)] | None = None


class ChampionSettings(Settings):
    """Which exported point is registered in MLflow as the champion.

    rule: `smallest` or `fastest` (in onnxruntime, on one CPU thread) of those that lose at most
    `within` points of word accuracy against the baseline, or the `most_accurate` of all. max_mb is
    the largest file allowed, 10^6 bytes.
    """

    rule: Literal["smallest", "fastest", "most_accurate"] = "smallest"
    within: Annotated[float, Field(ge=0)] = 1.0
    max_mb: Annotated[float, Field(gt=0)] | None = None


RATIOS = (0.62, 0.67, 0.72, 0.77, 0.82, 0.87)


class Experiment(Settings):
    """Everything that defines a frontier.

    Attributes:
        name: Of the MLflow experiment.
        seed: Of initial weights, data order, augmentation and rendered text.
        seeds: In place of seed for all but the text: the whole way from the baseline to the
            frontier is gone once for each, on the same data, and a point is their mean.
        ratios: Shares of the channels to remove, one point of the frontier each.
        export: What the exported networks are like; None: nothing is exported.
        quantize: How each export becomes a point in 8 bits; None: none does.
        champion: Which exported point MLflow's registry names champion; None: none.
        teacher: Who teaches where a section's distill is not 0; None: the baseline teaches sparse
            training and fine-tuning.
    """

    name: Annotated[str, _matching(r"(?!Default\Z)[A-Za-z0-9][A-Za-z0-9_-]*\Z", NAMES)]
    seed: Seed = 0
    seeds: Seeds | None = None
    ratios: Ratios = RATIOS
    data: DataSettings
    model: ModelSettings = ModelSettings()
    baseline: BaselineSettings
    teacher: TeacherSettings | None = None
    sparse: SparseSettings
    prune: PruneSettings = PruneSettings()
    finetune: FinetuneSettings
    export: ExportSettings | None = ExportSettings()
    quantize: QuantizeSettings | None = QuantizeSettings()
    champion: ChampionSettings | None = ChampionSettings()
    controls: ControlSettings = ControlSettings()
    notify: NotifySettings = NotifySettings()
    execution: ExecutionSettings = ExecutionSettings()

    @model_validator(mode="after")
    def _something_to_cut(self) -> Self:
        if not self.ratios and not self.prune.targets.wishes():
            raise ValueError("give ratios, prune.targets, or both")
        return self

    @model_validator(mode="after")
    def _taught_by_somebody(self) -> Self:
        if self.baseline.distill and not self.teacher:
            raise ValueError("baseline.distill needs a teacher section, and there is none")
        if self.baseline.distill and self.baseline.epochs == 0:
            raise ValueError("baseline.distill needs epochs to learn in, and baseline.epochs is 0")
        taught_baseline = self.baseline.distill and self.sparse.from_baseline
        taught_finetune = self.finetune.distill and self.finetune.epochs
        if self.teacher and not (taught_baseline or self.sparse.distill or taught_finetune):
            raise ValueError(
                "the teacher teaches no network that is cut: set sparse.distill or"
                " finetune.distill, or baseline.distill with sparse.from_baseline, or leave out"
                " the section"
            )
        return self

    @model_validator(mode="after")
    def _controls_of_ratios(self) -> Self:
        known = ", ".join(f"{ratio:g}" for ratio in self.ratios) or "none"
        for ratio in self.controls.ratios or ():
            if ratio not in self.ratios:
                raise ValueError(
                    f"controls.ratios are among the experiment's ratios ({known}); {ratio:g} is not"
                )
        if self.controls.small and self.model.backbone != VGG13:
            raise ValueError(
                f"controls.small needs a width factor, which {VGG13} alone has; model.backbone is"
                f" {self.model.backbone}"
            )
        if self.controls.ratios and not (self.controls.scratch or self.controls.small):
            raise ValueError("controls.ratios needs controls.scratch or controls.small to be true")
        if (self.controls.scratch or self.controls.small) and not self.ratios:
            raise ValueError("controls belong to ratios, and this experiment has targets alone")
        return self

    @property
    def training_seeds(self) -> tuple[int, ...]:
        """Seeds of initial weights, data order and augmentation."""
        return self.seeds or (self.seed,)


def load_experiment(
    path: Path, overrides: Sequence[str] = (), ratios: Sequence[float] | None = None
) -> Experiment:
    """Read an experiment file.

    Args:
        path: YAML file.
        overrides: `section.key=value`, the value as YAML.
        ratios: In place of the file's.

    Raises:
        SettingsError: No such file, not YAML, a key that does not exist, a value out of range.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainYaml)
    except OSError as error:
        raise SettingsError(f"cannot read params file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"params file {path} is not UTF-8") from error
    except NOT_YAML as error:
        raise SettingsError(f"params file {path} is not YAML: {_reason(error)}") from error
    if not isinstance(tree, dict):
        raise SettingsError(f"params file {path} must hold sections like `data:`, not {tree!r}")
    for override in overrides:
        _set(tree, override)
    if ratios is not None:
        _keep_controls_of(tree, ratios)
        tree["ratios"] = list(ratios)
    try:
        return Experiment.model_validate(tree)
    except ValidationError as error:
        raise SettingsError(f"{path}: {_explain(error.errors())}") from error


def _keep_controls_of(tree: dict[str, Any], ratios: Sequence[float]) -> None:
    """Take the controls from those of the file's ratios that are not computed now."""
    controls, own = tree.get("controls"), tree.get("ratios", RATIOS)
    if not isinstance(controls, dict) or not isinstance(own, list | tuple):
        return  # Which is refused as it is.
    if isinstance(named := controls.get("ratios"), list):
        kept = [ratio for ratio in named if ratio in ratios or ratio not in own]
        tree["controls"] = {**controls, "ratios": kept}


PLAIN = {
    "tag:yaml.org,2002:bool": re.compile("(?:true|True|TRUE|false|False|FALSE)$"),
    "tag:yaml.org,2002:int": re.compile("[-+]?(?:0|[1-9][0-9_]*)$"),
    "tag:yaml.org,2002:float": re.compile(
        r"""[-+]?(?: [0-9]+\.[0-9]* | \.[0-9]+ | [0-9]+(?=[eE]) ) (?:[eE][-+]?[0-9]+)? $
        | [-+]?\.(?:inf|Inf|INF) $ | \.(?:nan|NaN|NAN) $""",
        re.VERBOSE,
    ),
}
"""What YAML 1.2 takes for these; PyYAML reads 1.1, where `yes` is true and 1e-3 is text."""

NO_DATES = "tag:yaml.org,2002:timestamp"
"""A date is text: no setting is one."""

NOT_YAML = (yaml.YAMLError, ValueError, IndexError, RecursionError)
"""What PyYAML raises; the last three where a value is not of its tag, as in `!!int abc`."""

UNION_MEMBERS = ("str", "constrained-int", "literal['auto']", "int")

LITERAL = "literal_error"
KINDS = {
    "string_type": "text",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "an integer"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    "tuple_type": "a list in brackets",
}
"""Pydantic's errors of values of another kind, and what is needed."""


class _PlainYaml(yaml.SafeLoader):
    """YAML without surprises: no key twice, no alias or date, no `yes` for true, no `010` for 8."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError("a key is a word, not a list or a section")
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed in a params file")
        return super().compose_node(parent, index)


_PlainYaml.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (*PLAIN, NO_DATES)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in PLAIN.items():
    _PlainYaml.add_implicit_resolver(_tag, _pattern, list("tTfF-+.0123456789"))


def _set(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals:
        raise SettingsError(f"--set takes section.key=value; {override!r} has no '='")
    *sections, key = path.strip().split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise SettingsError(f"--set {override}: {section!r} is a value, not a section")
    try:
        tree[key] = yaml.load(text, Loader=_PlainYaml)
    except NOT_YAML as error:
        reason = _reason(error)
        raise SettingsError(f"--set {override}: the value is not YAML: {reason}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return " ".join(str(error).split())


def _explain(errors: Sequence[ErrorDetails]) -> str:
    """One sentence with the rule, the value and, for a mistyped key, the nearest known one."""
    # A mistyped key is also a missing one; the first of the two says what to mend.
    error = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    parts = [str(part) for part in error["loc"] if str(part) not in UNION_MEMBERS]
    # A value that fits no member of a union has one error for each; the last is the number's.
    same = [e for e in errors if [str(p) for p in e["loc"]][: len(parts)] == parts]
    if len(parts) < len(error["loc"]):
        error = same[-1]
    where = ".".join(parts)
    if error["type"] == "extra_forbidden":
        return f"unknown key {where!r}; {_hint(parts)}"
    if error["type"] == "missing":
        return f"key {where!r} is needed; add it to the file or with --set {where}=..."
    if needed := _needed(parts, same):
        return f"{where}: {needed} is needed, not {error['input']!r}"
    message = error["msg"].removeprefix("Value error, ")
    # A rule over a whole section names its values itself.
    value = "" if isinstance(error["input"], dict) else f", not {error['input']!r}"
    place = f"{where}: " if where else ""
    return f"{place}{message[0].lower()}{message[1:]}{value}"


def _needed(parts: Sequence[str], errors: Sequence[ErrorDetails]) -> str | None:
    """What is needed in place of a value of another kind; None where its kind is right."""
    types = [error["type"] for error in errors]
    if types == ["model_type"]:
        field = _section(parts[:-1])[parts[-1]]
        off = type(None) in get_args(field.annotation)
        return "a section" + ", or null, which switches it off," * off
    if types == ["too_short"]:
        return f"at least {errors[0]['ctx']['min_length']} item"
    kinds = [e["ctx"]["expected"] if e["type"] == LITERAL else KINDS.get(e["type"]) for e in errors]
    known = [kind for kind in kinds if kind]
    return " or ".join(known) if len(known) == len(kinds) and types != [LITERAL] else None


def _hint(parts: Sequence[str]) -> str:
    """Where a key that does not exist may have been meant to be."""
    *sections, key = parts
    known = _section(sections)
    if near := difflib.get_close_matches(key, known, n=1):
        return f"did you mean {near[0]!r}?"
    if elsewhere := [path for path in _all_keys() if path.rpartition(".")[2] == key]:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"known here: {', '.join(known)}"


def _section(path: Sequence[str]) -> dict[str, FieldInfo]:
    """The keys of a section."""
    model: type[BaseModel] = Experiment
    for part in path:
        (model,) = _models(model.model_fields[part])
    return model.model_fields


def _all_keys(path: tuple[str, ...] = ()) -> Iterator[str]:
    """Every key with its sections before it, such as baseline.epochs."""
    for key, field in _section(path).items():
        yield ".".join((*path, key))
        if _models(field):
            yield from _all_keys((*path, key))


def _models(field: FieldInfo) -> list[type[BaseModel]]:
    """What a section is made into; nothing where the field holds a value."""
    kinds = (field.annotation, *get_args(field.annotation))
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
