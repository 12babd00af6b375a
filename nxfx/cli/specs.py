"""SPEC → model and example arguments.

``package.module:factory`` and ``path/file.py:factory`` are imported with the current directory first on ``sys.path``,
as ``python -m`` does; ``file.pt2`` is an exported program, or a model that nxfx has prepared and saved.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import importlib.util
import inspect
import logging
import os
import pkgutil
import sys
import traceback
import types
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nxfx import storage
from nxfx.errors import NxfxError, UsageError
from nxfx.prepared import PreparedModule
from nxfx.report.locations import frame_rank

FORMS = "package.module:factory, path/file.py:factory or a .pt2 file"
_RETURNS = "return model, (model, args) or (model, args, kwargs)"


class ModelError(NxfxError):
    """The user's own module or factory raised."""


@dataclass
class Loaded:
    """What a SPEC names. ``prepared`` is set instead when it names a saved PreparedModule."""

    model: torch.nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    prepared: PreparedModule | None = None


def load(spec: str) -> Loaded:
    """The model and arguments that ``spec`` names, checked against each other.

    Raises:
        UsageError: no such module, file or attribute (tells the nearest), a wrong return, arguments that do not fit.
        ModelError: the module or the factory raised; names its line.
    """
    sys_path_first(os.getcwd())
    if spec.endswith(".pt2"):
        return _load_program(Path(spec))
    place, separator, attribute = spec.rpartition(":")
    if not separator or not place or not attribute:
        raise UsageError(_malformed(spec))
    module = _load_file(Path(place), attribute) if _is_path(place) else _load_module(place)
    found = _resolve(module, place, attribute)
    return _checked(*_unpack(_call(found, attribute, spec), spec), spec)


def sys_path_first(directory: str) -> None:
    """Import from ``directory`` before anywhere else."""
    if sys.path[:1] not in ([directory], [""]):
        sys.path.insert(0, directory)


def _is_path(place: str) -> bool:
    return place.endswith(".py") or os.sep in place or "/" in place


def _malformed(spec: str) -> str:
    path = Path(spec.rstrip(":"))
    if path.suffix == ".py" and path.is_file():
        names = _top_level_names(path)
        return f"{spec!r} names no factory: write {path}:NAME" + (f", e.g. {path}:{names[-1]}" if names else "")
    if path.is_file():
        return f"{spec!r} is not a .py or .pt2 file: SPEC is {FORMS}"
    return f"cannot read SPEC {spec!r}: write {FORMS}"


def _top_level_names(path: Path) -> list[str]:
    with contextlib.suppress(OSError, SyntaxError, ValueError):
        definitions = (ast.FunctionDef, ast.ClassDef)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        return [n.name for n in tree.body if isinstance(n, definitions) and not n.name.startswith("_")]
    return []


def _near(name: str, names: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(names), n=1)
    return f" Did you mean {found[0]!r}?" if found else ""


# -- importing ---------------------------------------------------------------------------------------------


def _load_file(path: Path, attribute: str) -> types.ModuleType:
    if not path.is_file():
        if path.suffix != ".py" and path.with_name(path.name + ".py").is_file():
            raise UsageError(f"no file {str(path)!r}. Did you mean {f'{path}.py:{attribute}'!r}?")
        raise UsageError(f"no file {str(path)!r}.{_near_file(path)}")
    if path.suffix != ".py":
        raise UsageError(f"{str(path)!r} is not a Python file: SPEC is {FORMS}")
    directory = str(path.resolve().parent)
    if directory not in sys.path:
        sys.path.insert(1, directory)  # what stands beside the file can be imported, as when it is run
    # Under its own name where that is free, so that classes defined in it can be found again.
    name = path.stem if path.stem.isidentifier() and not _is_taken(path) else f"_nxfx_spec_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module, execute = importlib.util.module_from_spec(spec), spec.loader.exec_module
    sys.modules[name] = module
    try:
        _user_code(lambda: execute(module), f"importing {path}")
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _is_taken(path: Path) -> bool:
    if path.stem in sys.modules:
        return True
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(path.stem)
        return spec is not None and Path(spec.origin or "").resolve() != path.resolve()
    return False


def _near_file(path: Path) -> str:
    with contextlib.suppress(OSError):
        directory = path.parent
        files = [f.name for f in directory.iterdir() if f.suffix == path.suffix]
        found = difflib.get_close_matches(path.name, files, n=1)
        return f" Did you mean {str(directory / found[0])!r}?" if found else ""
    return ""


def _load_module(name: str) -> types.ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise UsageError(f"{name!r} is no module name: SPEC is {FORMS}")
    importlib.invalidate_caches()
    try:
        module: types.ModuleType = _user_code(lambda: importlib.import_module(name), f"importing {name}")
    except ModelError as error:
        missing = error.__cause__
        if isinstance(missing, ModuleNotFoundError) and missing.name and (name + ".").startswith(missing.name + "."):
            raise UsageError(f"no module {missing.name!r}.{_near_module(name, missing.name)}") from None
        raise
    return module


def _near_module(wanted: str, missing: str) -> str:
    parent, _, leaf = missing.rpartition(".")
    path = list(getattr(sys.modules.get(parent), "__path__", [])) if parent else sys.path
    names = [m.name for m in pkgutil.iter_modules(path)]
    found = difflib.get_close_matches(leaf, names, n=1)
    if found:
        return f" Did you mean {'.'.join([*([parent] if parent else []), found[0]]) + wanted[len(missing) :]!r}?"
    for name in (wanted.replace(".", "/") + ".py", wanted + "y"):  # a path written as a module, or half an extension
        if name.endswith(".py") and Path(name).is_file():
            return f" Did you mean {name!r}?"
    return ""


def _resolve(module: types.ModuleType, place: str, attribute: str) -> Any:
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [n for n in dir(found) if not n.startswith("_")]
            own = [n for n in public if getattr(getattr(found, n), "__module__", "") == module.__name__]
            listed = "" if _near(part, public) or not own else f" It has: {', '.join(own[:10])}."
            owner = place if found is module else f"{place}:{getattr(found, '__name__', type(found).__name__)}"
            raise UsageError(f"{owner!r} has no {part!r}.{_near(part, public)}{listed}")
        found = getattr(found, part)
    return found


# -- calling -----------------------------------------------------------------------------------------------


def _user_code(run: Callable[[], Any], doing: str) -> Any:
    try:
        return run()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module that calls sys.exit must not end the command without a word
        raise ModelError(f"{doing} raised {_told(error)}") from error


def _told(error: BaseException) -> str:
    """``ValueError: message at file:line: source``; the line is the user's own where there is one."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} at {error.filename}:{error.lineno}: {(error.text or '').strip()}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(("<", __file__))]
    own = [f for f in frames if frame_rank(f.filename) == 2] or [f for f in frames if frame_rank(f.filename) == 1]
    return f"{text} at {own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else text


def _call(found: Any, name: str, spec: str) -> Any:
    if isinstance(found, (torch.nn.Module, tuple)):
        return found
    if not callable(found):
        raise UsageError(
            f"{spec!r} is a {type(found).__name__}, not a factory: write a function that returns the model"
        )
    needed = _required_parameters(found)
    if needed:
        kind = "class" if isinstance(found, type) else "factory"
        raise UsageError(
            f"{kind} {name!r} needs {', '.join(needed)}: a SPEC is called without arguments; "
            "write a function that calls it with them"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=DeprecationWarning)
        return _user_code(found, f"{name}()")


def _required_parameters(function: Any) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]


def _unpack(value: Any, spec: str) -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
    parts = value if isinstance(value, tuple) else (value,)
    if not 1 <= len(parts) <= 3:
        raise UsageError(f"{spec!r} returned {len(parts)} values: {_RETURNS}")
    model = parts[0]
    args: Any = parts[1] if len(parts) > 1 else ()
    kwargs: Any = parts[2] if len(parts) > 2 else {}
    if not isinstance(model, torch.nn.Module):
        if isinstance(model, type) and issubclass(model, torch.nn.Module):
            raise UsageError(f"{spec!r} returned the class {model.__name__}, not a module: call it")
        raise UsageError(
            f"{spec!r} returned a {type(model).__name__} where the model belongs, not a torch.nn.Module: {_RETURNS}"
        )
    if isinstance(args, torch.Tensor):
        raise UsageError(f"{spec!r} returned a tensor for args: write (model, (tensor,)), with the comma")
    if isinstance(args, dict):
        raise UsageError(f"{spec!r} returned a dict for args: write (model, (), {{...}}) for keyword arguments")
    if not isinstance(args, (tuple, list)):
        raise UsageError(f"{spec!r} returned a {type(args).__name__} for args: it must be a tuple, as (model, (x,))")
    if not isinstance(kwargs, dict) or not all(isinstance(k, str) for k in kwargs):
        raise UsageError(f"{spec!r} returned kwargs that are no dict of names: {_RETURNS}")
    return model, tuple(args), dict(kwargs)


def _checked(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], spec: str) -> Loaded:
    """The arguments against ``forward``'s signature."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return Loaded(model, args, kwargs)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        names = ", ".join(map(str, signature.parameters.values()))
        given = (
            f"{len(args) + len(kwargs)} argument{'s' * (len(args) + len(kwargs) != 1)}"
            if args or kwargs
            else "no arguments"
        )
        how = (
            f"let the factory {_RETURNS.replace('model, ', '', 1)}"
            if not args and not kwargs
            else "change what the factory returns"
        )
        raise UsageError(
            f"{spec!r} gives {given}, but {type(model).__name__}.forward takes ({names}): {error}; {how}"
        ) from None
    return Loaded(model, args, kwargs)


# -- .pt2 --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """torch logs a whole traceback before it refuses a file; the one line is ours."""
    previous = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def _is_prepared(path: Path) -> bool:
    """Whether nxfx saved the file; else ``torch.export.save`` did.

    Raises:
        UsageError: neither.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = {name.rpartition("/")[2] for name in archive.namelist()}
        if names & {"archive_format", "serialized_exported_program.json"}:
            return storage.EXTRA in names
    raise UsageError(
        f"{str(path)!r} is not an exported program: torch.export.save and PreparedModule.save write such files"
    )


def _load_program(path: Path) -> Loaded:
    if not path.is_file():
        raise UsageError(
            f"{str(path)!r} is a directory" if path.is_dir() else f"no file {str(path)!r}.{_near_file(path)}"
        )
    prepared = _is_prepared(path)
    try:
        with _silent():
            if prepared:
                found = storage.load(path)
                return Loaded(found, prepared=found)
            program = torch.export.load(path)
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UsageError(
            f"{str(path)!r} cannot be read (torch {torch.__version__}): {type(error).__name__}: {reason}"
        ) from error
    example = program.example_inputs
    if example is None:
        raise UsageError(
            f"{str(path)!r} holds no example inputs: export it with them, or write a factory that returns (model, args)"
        )
    args, kwargs = example
    return _checked(_keyword_only(program.module(), kwargs), tuple(args), dict(kwargs), str(path))


def _keyword_only(module: torch.nn.Module, names: Iterable[str]) -> torch.nn.Module:
    """``module`` with these parameters of ``forward`` marked keyword-only.

    An exported module takes each argument only in the way it was exported with, but its signature does not say so.
    """
    forward, names = module.forward, set(names)
    parameters = inspect.signature(forward).parameters.values()
    keywords = [p.replace(kind=p.KEYWORD_ONLY) for p in parameters if p.name in names]

    def keyword_only(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    positional = [p for p in parameters if p.name not in names]
    keyword_only.__signature__ = inspect.Signature([*positional, *keywords])  # type: ignore[attr-defined]
    if keywords:
        module.__dict__["forward"] = keyword_only
    return module
