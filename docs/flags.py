"""Write the tables of all flags into docs/train.md, from the parsers: python docs/flags.py"""

import re
import sys
from pathlib import Path

PAGE = Path(__file__).parent / "train.md"
sys.path.insert(0, str(PAGE.parents[1]))

import train  # noqa: E402

BLOCK = re.compile(r"(<!-- flags.*?-->\n).*(<!-- end of flags -->)", re.S)
SHARED = ("optimization", "the run")  # groups of flags that every task has
OF_TASK = set().union(*(task.DEFAULTS for task in train.TASKS.values()))  # flags whose default depends on the task


def row(action, shared=False):
    """| flag and values | meaning, with its default |"""
    values = ""
    if action.choices:
        values = " " + "\\|".join(action.choices)
    elif action.nargs != 0:
        values = " ..." if action.nargs == "+" else " VALUE"
    text = action.help or ""
    if shared and action.dest in OF_TASK:
        text = text.split(" (default")[0]
    if action.default not in (None, False) and "(default" not in text:
        text = f"{text} (default: {action.default})".strip()
    return f"| `{action.option_strings[0]}{values}` | {text.replace('%%', '%').replace('|', chr(92) + '|')} |"


def table(title, rows, *more):
    return "\n".join([f"### {title}", "", *more, "| flag | meaning |", "| --- | --- |", *rows, ""])


def defaults(task, actions):
    """A sentence on the shared flags whose default is the task's own."""
    mine = {action.dest for action in actions}
    words = [f"`--{name.replace('_', '-')} {value}`" for name, value in task.DEFAULTS.items() if name not in mine]
    return f"Defaults: {', '.join(words)}."


def tables():
    """All flags, those of every task first."""
    parts = []
    for name, task in train.TASKS.items():
        groups = {group.title: group._group_actions for group in train.parser_for(name)._action_groups}
        if not parts:
            parts += [table(f"Every task: {title}", [row(a, shared=True) for a in groups[title]]) for title in SHARED]
        actions = groups[f"flags of --task {name}"]
        parts.append(table(f"`--task {name}`", map(row, actions), defaults(task, actions), ""))
    return "\n".join(parts)


def page():
    """docs/train.md with its tables as they should be."""
    return BLOCK.sub(lambda match: match[1] + "\n" + tables() + "\n" + match[2], PAGE.read_text())


if __name__ == "__main__":
    PAGE.write_text(page())
