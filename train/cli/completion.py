"""Scripts that complete `jaxmerge` in bash, zsh and fish: verbs, then keys of the verb, flags and files."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..log import UserError
from ..resolve import nearest
from .keys import settable
from .words import Verb

BASH = """\
# Completion of jaxmerge for bash: source <(jaxmerge completion bash)
_jaxmerge() {
    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" words="" file
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W "@VERBS@" -- "$word"))
        return
    fi
    # bash makes a word of "=": what follows it is a value, a file perhaps.
    if [[ $word == "=" ]]; then
        word=""
    elif [[ $before != "=" ]]; then
        case "${COMP_WORDS[1]}" in
@CASES@
        esac
        COMPREPLY=($(compgen -W "$words" -- "$word"))
    fi
    if [[ ${COMPREPLY[0]} == *= ]]; then
        compopt -o nospace 2>/dev/null
    elif ((${#COMPREPLY[@]} == 0)); then
        compopt -o filenames 2>/dev/null
    fi
    while IFS= read -r file; do
        COMPREPLY+=("$file")
    done < <(compgen -f -- "$word")
}
complete -F _jaxmerge jaxmerge
"""
ZSH = """\
#compdef jaxmerge
# Completion of jaxmerge for zsh: source <(jaxmerge completion zsh), after compinit
_jaxmerge() {
    local -a words_of_verb flags_of_verb
    if ((CURRENT == 2)); then
        compadd -- @VERBS@
        return
    fi
    case "${words[2]}" in
@CASES@
    esac
    if compset -P '*='; then
        _files
        return
    fi
    compadd -S '' -- $words_of_verb
    compadd -- $flags_of_verb
    _files
}
compdef _jaxmerge jaxmerge
"""
FISH = """\
# Completion of jaxmerge for fish: jaxmerge completion fish | source
complete -c jaxmerge -n __fish_use_subcommand -f -a "@VERBS@"
complete -c jaxmerge -n __fish_use_subcommand -f -a "--help --version"
@CASES@
"""


def script(shell: str, verbs: Mapping[str, Verb]) -> str:
    """The script for a shell: bash, zsh or fish."""
    if shell not in SHELLS:
        raise UserError(f"no completion for {shell!r}{nearest(shell, list(SHELLS))}")
    return SHELLS[shell](verbs)


def words_of(verb: Verb) -> tuple[list[str], list[str]]:
    """(`key=` for every key that can be set on the command line, flags)."""
    return [f"{path}=" for path in settable((*verb.settings, *verb.also))], [*verb.flags, "--help"]


def one_list(verb: Verb) -> str:
    known, flags = words_of(verb)
    return " ".join([*known, *flags])


def bash(verbs: Mapping[str, Verb]) -> str:
    cases = [f'        {name}) words="{one_list(verb)}" ;;' for name, verb in verbs.items()]
    return BASH.replace("@VERBS@", " ".join([*verbs, "--help", "--version"])).replace("@CASES@", "\n".join(cases))


def zsh(verbs: Mapping[str, Verb]) -> str:
    cases = []
    for name, verb in verbs.items():
        known, flags = words_of(verb)
        cases.append(f"    {name}) words_of_verb=({' '.join(known)}); flags_of_verb=({' '.join(flags)}) ;;")
    return ZSH.replace("@VERBS@", " ".join([*verbs, "--help", "--version"])).replace("@CASES@", "\n".join(cases))


def fish(verbs: Mapping[str, Verb]) -> str:
    cases = [
        f'complete -c jaxmerge -n "__fish_seen_subcommand_from {name}" -a "{one_list(verb)}"'
        for name, verb in verbs.items()
    ]
    return FISH.replace("@VERBS@", " ".join(verbs)).replace("@CASES@", "\n".join(cases))


SHELLS: dict[str, Callable[[Mapping[str, Verb]], str]] = {"bash": bash, "zsh": zsh, "fish": fish}
