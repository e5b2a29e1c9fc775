"""Flags: types with a range, a parser that says what is wrong in one sentence, recipes, and flags back from args.json.

A recipe is a text file of flags, several on a line. # begins a comment, quotes hold words with spaces together, and a
backslash is a letter like any other, as paths on Windows have them. A recipe may include others by @FILE.

Needs: nothing but Python.
"""

import argparse
import difflib
import os
import re

QUOTED = r"""\"[^"]*"|'[^']*'"""
CODE = re.compile(rf"""(?:[^"'#]+|(?<=\S)\#|{QUOTED})*""")  # a line up to its comment
WORD = re.compile(rf"""(?:[^\s"']+|{QUOTED})+""")
LONGEST_RECIPE = 100_000  # bytes
RANGES = {  # where the types below allow more than a machine can hold
    "depth": (1, 1000),
    "decoder_depth": (1, 1000),
    "embed_dim": (1, 100_000),
    "decoder_embed_dim": (1, 100_000),
    "channels": (1, 100_000),
    "img_size": (1, 10_000),
    "data_size": (1, 10**7),
    "epochs": (1, 10**6),
    "layer_decay": (0, 1),
    "crop_ratio": (0.05, 1),
}
RENAMED = {"--loss": "--task contrast for supcon, --task classify for cross-entropy"}  # flags of earlier versions


def path(text):
    """A file or folder; ~ is the home folder."""
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} holds a NUL, which no path can")
    return os.path.expanduser(text)


def count(text):
    """A whole number from 1 to a billion."""
    value = int(text)
    if not 1 <= value <= 10**9:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1 and at most a billion")
    return value


def positive(text):
    """A number from 1e-30 to 1e9, which 32 bits hold easily."""
    value = float(text)
    if not 1e-30 <= value <= 1e9:
        raise argparse.ArgumentTypeError(f"{text} must be a positive number, at most 1e9")
    return value


def between(low, high, kind=float):
    """-> a type for argparse: numbers from low up to, but not including, high; 0 or at least 1e-30."""

    def convert(text):
        value = kind(text)
        if not low <= value < high or 0 < value < 1e-30:
            raise argparse.ArgumentTypeError(f"{text} must be at least {low} and below {high}")
        return value

    convert.__name__ = kind.__name__  # argparse prints it: "invalid float value"
    return convert


# ---------------------------------------------------------------------------- recipes


def expand(argv, including=()):
    """A command line, with the words of a recipe in place of @FILE. including: the recipes that lead here"""
    words = []
    for word in argv:
        words += read_recipe(os.path.expanduser(word[1:]), including) if word.startswith("@") else [word]
    return words


def read_recipe(file, including):
    """The words of a recipe. ValueError names the file, and the line where it can."""
    if file in including:
        raise ValueError(f"recipe {file} includes itself; drop the line")
    if not os.path.isfile(file):
        kind = "no regular file" if os.path.exists(file) else "not there"
        raise ValueError(f"recipe {file} is {kind}")
    if os.path.getsize(file) > LONGEST_RECIPE:
        raise ValueError(f"recipe {file} has more than {LONGEST_RECIPE:,} bytes; is it another file?")
    try:
        with open(file, "rb") as opened:
            lines = opened.read().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {number} of recipe {file}: not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise ValueError(f"cannot read recipe {file} ({error.strerror})") from None

    words = []
    for number, line in enumerate(lines, start=1):
        try:
            words += expand(split(line), (*including, file))
        except ValueError as error:
            raise ValueError(f"line {number} of recipe {file}: {error}") from None
    return words


def split(line):
    """A line of a recipe -> its words."""
    code = CODE.match(line).group()
    quote = line[len(code):len(code) + 1]
    if quote in ("'", '"'):
        raise ValueError(f"the quote {quote} is not closed")
    words = [match.group() for match in WORD.finditer(code)]
    if words and words[-1] == "\\":
        raise ValueError("a backslash at the end; drop it, flags may go on in the next line")
    return [re.sub(QUOTED, lambda quoted: quoted.group()[1:-1], word) for word in words]


# ---------------------------------------------------------------------------- the parser


class Parser(argparse.ArgumentParser):
    """argparse; a mistake is a ValueError."""

    def __init__(self, **options):
        if "description" in options:
            options["description"] = options["description"].split("\n\n")[0]  # a module's first sentences
        super().__init__(allow_abbrev=False, formatter_class=Help, usage="%(prog)s [flags]", **options)

    def parse_known_args(self, args=None, namespace=None):
        given, unknown = super().parse_known_args(args, namespace)
        for name, (low, high) in RANGES.items():
            value = getattr(given, name, None)
            numbers = value if isinstance(value, list) else [value]
            if value is not None and not low <= min(numbers) <= max(numbers) <= high:
                raise ValueError(f"--{name.replace('_', '-')} {value} must lie between {low} and {high:,}")
        return given, unknown

    def error(self, message):
        raise ValueError(message)

    def group(self, title):
        """-> add_argument of a new group."""
        return self.add_argument_group(title).add_argument

    def show_defaults(self, defaults):
        """They stand in --help but are filled in later, by the one who must know which flags were given."""
        for action in self._actions:
            value = defaults.get(action.dest)
            if value is not None:
                text = f"{value:g}" if isinstance(value, float) else str(value)
                words = (action.help or "").split(" (default")[0]
                action.default, action.help = None, f"{words} (default: {text})"

    def flags(self):
        """The names of all flags."""
        return list(self._option_string_actions)

    def as_argv(self, saved):
        """{destination: value} as a command line, so that flags read from a file are checked like typed ones."""
        words = []
        for action in self._actions:
            value = saved.get(action.dest)
            if value is None:
                continue
            if action.nargs != 0:
                values = value if isinstance(value, list) else [value]
                words += [action.option_strings[0], *map(str, values)]
            elif value == action.const:
                words.append(action.option_strings[0])
        return words


class Help(argparse.HelpFormatter):
    """--help on two screens, with the defaults that matter."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=110)

    def _get_default_metavar_for_optional(self, action):
        if action.type is None:
            return "NAME"
        return "N" if action.type.__name__ in ("count", "int") else "X"

    def _get_help_string(self, action):
        text = action.help or ""
        if action.default in (None, False, argparse.SUPPRESS) or not action.option_strings:
            return text
        return f"{text} (default: %(default)s)"


def refuse(word, task, parsers):
    """Why a flag is unknown: it belongs to other tasks, or it is misspelled. parsers: {task: Parser}"""
    name = word.split("=")[0]
    if name in RENAMED:
        raise ValueError(f"{name} is gone; use {RENAMED[name]}")
    owners = [other for other, parser in parsers.items() if name in parser.flags()]
    if owners:
        raise ValueError(f"{name} belongs to --task {' or '.join(owners)}, not to --task {task}; drop it")
    every = set().union(*(parser.flags() for parser in parsers.values()))
    near = difflib.get_close_matches(name, parsers[task].flags(), n=1) or difflib.get_close_matches(name, every, n=1)
    raise ValueError(f"unknown flag {name}" + (f"; did you mean {near[0]}?" if near else ""))
