"""Completions of the command line for shells: `errand-boy completion`.

They are made from the parsers, so they always have all options. The shell asks `errand-boy ps` for
the names of jobs when it needs them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from shlex import quote

from errand_boy._cli.outline import Option, Outline, outlines

_JOBS = "errand-boy ps --all --quiet 2>/dev/null"
_WHERE = {
    "bash": 'in ~/.bashrc: eval "$(errand-boy completion bash)"',
    "zsh": "errand-boy completion zsh > DIRECTORY/_errand-boy, in a directory of $fpath",
    "fish": "errand-boy completion fish > ~/.config/fish/completions/errand-boy.fish",
}


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog=prog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Write the script with which a shell completes the command line of "
        "errand-boy.\nTo install it:\n\n"
        + "\n".join(f"  {shell}: {where}" for shell, where in _WHERE.items()),
    )
    parser.add_argument("shell", choices=_WHERE)
    return parser


def main(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Write the script; return the exit status."""
    shell = parser.parse_args(arguments).shell
    print(_MAKERS[shell](outlines()))
    return 0


def _long_first(option: Option) -> str:
    return max(option.names, key=len)


# -- bash --

_BASH = """\
# Completion of errand-boy for bash, written by `errand-boy completion bash`.

_errand_boy() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} IFS=$' \\t\\n'
    local options= valued= operands= kind= choices= at name
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W {commands} -- "$word"))
        return
    fi
    case ${{COMP_WORDS[1]}} in
{tables}
    *) return ;;
    esac
    # bash divides --option=value into three words.
    if [[ $word == = ]]; then
        word=
    elif [[ $before == = ]]; then
        before=${{COMP_WORDS[COMP_CWORD-2]}}
    fi
    # The first word that is neither an option nor the value of one.
    for ((at = 2; at < COMP_CWORD; at++)); do
        name=${{COMP_WORDS[at]}}
        if [[ $name == -- ]]; then
            ((at++))
            break
        elif [[ $name != -* ]]; then
            break
        elif [[ " $valued " == *" $name "* ]]; then
            [[ ${{COMP_WORDS[at+1]}} != = ]] || ((at++))
            ((at++))
            [[ ${{COMP_WORDS[at+1]}} != = ]] || ((at += 2)) # as in --limit wall=60
        fi
    done
    if ((at < COMP_CWORD)) || [[ $operands == command && $before == -- ]]; then
        case $operands in
        command)
            if declare -F _command_offset >/dev/null; then
                _command_offset "$at"
            elif ((at < COMP_CWORD)); then
                COMPREPLY=($(compgen -f -- "$word"))
            else
                COMPREPLY=($(compgen -c -- "$word"))
            fi
            return
            ;;
        none) return ;;
        esac
    fi
    case " ${{COMP_WORDS[1]}} $before " in
{values}
    esac
    case $kind in
    file) COMPREPLY=($(compgen -f -- "$word")) ;;
    directory) COMPREPLY=($(compgen -d -- "$word")) ;;
    user) COMPREPLY=($(compgen -u -- "$word")) ;;
    group) COMPREPLY=($(compgen -g -- "$word")) ;;
    choice)
        COMPREPLY=($(compgen -W "$choices" -- "$word"))
        [[ ${{COMPREPLY[0]}} != *= ]] || compopt -o nospace 2>/dev/null
        ;;
    value) ;;
    *)
        if [[ $word == -* ]]; then
            COMPREPLY=($(compgen -W "$options" -- "$word"))
        elif [[ $operands == jobs ]]; then
            COMPREPLY=($(compgen -W "$({jobs})" -- "$word"))
        elif [[ $operands == command ]]; then
            COMPREPLY=($(compgen -c -- "$word"))
        elif [[ $operands != none ]]; then
            COMPREPLY=($(compgen -W "$operands" -- "$word"))
        fi
        ;;
    esac
}}

complete -o bashdefault -o default -F _errand_boy errand-boy"""


def _bash(commands: list[Outline]) -> str:
    tables, values = [], []
    for command in commands:
        names = " ".join(name for option in command.options for name in option.names)
        valued = " ".join(
            name
            for option in command.options
            for name in option.names
            if option.metavar and not option.is_optional
        )
        operands = " ".join(command.words) if command.words else command.operands
        tables.append(
            f"    {command.name}) options={quote(names)} valued={quote(valued)} "
            f"operands={quote(operands)} ;;"
        )
        for option in command.options:
            if option.kind != "none":
                patterns = "|".join(f"' {command.name} {name} '" for name in option.names)
                choices = f" choices={quote(' '.join(option.choices))}" if option.choices else ""
                values.append(f"    {patterns}) kind={option.kind}{choices} ;;")
    return _BASH.format(
        commands=quote(" ".join(command.name for command in commands)),
        tables="\n".join(tables),
        values="\n".join(values),
        jobs=_JOBS,
    )


# -- zsh --

_ZSH_ACTIONS = {
    "file": "_files",
    "directory": "_files -/",
    "user": "_users",
    "group": "_groups",
    "value": " ",
}
_ZSH_OPERANDS = {
    "command": ["'(-)1: :{_command_names -e}'", "'*:: :{_normal}'"],
    "jobs": ["'*:job:_errand_boy_jobs'"],
    "none": [],
}


def _zsh(commands: list[Outline]) -> str:
    lines = [
        "#compdef errand-boy",
        "# Completion of errand-boy for zsh, written by `errand-boy completion zsh`.",
        "",
        "_errand_boy_jobs() {",
        f'    local -a jobs=("${{(@f)$({_JOBS})}}")',
        "    compadd -- ${jobs:#}",
        "}",
        "",
        "_errand-boy() {",
        "    local curcontext=$curcontext state line",
        "    local -a subcommands=(",
        *(f"        {quote(f'{each.name}:{each.summary}')}" for each in commands),
        "    )",
        "    _arguments -C '1: :->command' '*:: :->arguments'",
        "    case $state in",
        "    command) _describe -t commands command subcommands ;;",
        "    arguments)",
        "        case $words[1] in",
    ]
    for command in commands:
        specs = [quote(spec) for option in command.options for spec in _zsh_specs(option)]
        if command.words:
            specs.append(quote(f"1: :({' '.join(command.words)})"))
        specs += _ZSH_OPERANDS[command.operands]
        joined = " \\\n                ".join(["_arguments -s -S", *specs])
        lines.append(f"        {command.name}) {joined} ;;")
    return "\n".join([*lines, "        esac ;;", "    esac", "}", "", '_errand-boy "$@"'])


def _zsh_specs(option: Option) -> Iterable[str]:
    text = option.text.replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]")
    text = text.replace(":", "\\:")
    for name in option.names:
        spec = f"*{name}{'=' if name.startswith('--') and option.metavar else ''}[{text}]"
        if option.metavar:
            action = _ZSH_ACTIONS.get(option.kind) or f"({' '.join(option.choices)})"
            if any(choice.endswith("=") for choice in option.choices):
                action = f"{{compadd -S '' -- {' '.join(option.choices)}}}"
            label = option.metavar.replace(":", "\\:")
            spec += f"{'::' if option.is_optional else ':'}{label}:{action}"
        yield spec


# -- fish --

_FISH_KINDS = {
    "none": "",
    "file": " -r -F",
    "directory": " -x -a '(__fish_complete_directories)'",
    "user": " -x -a '(__fish_complete_users)'",
    "group": " -x -a '(__fish_complete_groups)'",
    "value": " -x",
}


def _fish(commands: list[Outline]) -> str:
    lines = [
        "# Completion of errand-boy for fish, written by `errand-boy completion fish`.",
        "complete -c errand-boy -f",
    ]
    for command in commands:
        lines.append(
            f"complete -c errand-boy -n __fish_use_subcommand -a {command.name} "
            f"-d {_fish_quoted(command.summary)}"
        )
    for command in commands:
        start = f"complete -c errand-boy -n '__fish_seen_subcommand_from {command.name}'"
        for option in command.options:
            names = "".join(
                f" -l {name[2:]}" if name.startswith("--") else f" -s {name[1:]}"
                for name in option.names
                if name.startswith("--") or len(name) == 2
            )
            kind = _FISH_KINDS.get(option.kind)
            if kind is None:
                kind = f" -x -a {_fish_quoted(' '.join(option.choices))}"
            lines.append(f"{start}{names}{kind} -d {_fish_quoted(option.text)}")
        if command.operands == "jobs":
            lines.append(f"{start} -x -a '({_JOBS})'")
        elif command.operands == "command":
            valued = " ".join(
                name
                for option in command.options
                for name in option.names
                if option.metavar and not option.is_optional
            )
            lines.append(f"{start} -x -a '(__fish_complete_subcommand --fcs-skip=2 - {valued})'")
        elif command.words:
            lines.append(f"{start} -x -a {_fish_quoted(' '.join(command.words))}")
    return "\n".join(lines)


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


_MAKERS: dict[str, Callable[[list[Outline]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
