"""Flags: types with a range, a parser that says what is wrong in one sentence, and flags back from args.json.

Needs: nothing but Python.
"""

import argparse
import difflib
import math
import os
import shlex


RENAMED = {"--loss": "--task contrast for supcon, --task classify for cross-entropy"}  # flags of earlier versions


def path(text):
    """A file or folder; ~ is the home folder."""
    return os.path.expanduser(text)


def count(text):
    """A whole number from 1 up."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def positive(text):
    """A finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a positive number")
    return value


def between(low, high, kind=float):
    """-> a type for argparse: numbers from low up to, but not including, high."""

    def convert(text):
        value = kind(text)
        if not low <= value < high:
            limit = f"at least {low}" if high == math.inf else f"at least {low} and below {high}"
            raise argparse.ArgumentTypeError(f"{text} must be {limit}")
        return value

    convert.__name__ = kind.__name__  # argparse prints it: "invalid float value"
    return convert


class Parser(argparse.ArgumentParser):
    """argparse with recipes (@FILE: several flags a line, # comments); a mistake is a ValueError."""

    def __init__(self, **options):
        if "description" in options:
            options["description"] = options["description"].split("\n\n")[0]  # a module's first sentences
        super().__init__(fromfile_prefix_chars="@", allow_abbrev=False, formatter_class=Help, usage="%(prog)s [flags]",
                         **options)

    def convert_arg_line_to_args(self, line):
        return shlex.split(line, comments=True)

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
