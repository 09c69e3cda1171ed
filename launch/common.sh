# shellcheck shell=bash
# Shared by the scripts here: errors in one line, commands quoted so that they can be pasted, and --dry-run.

dry_run=""

# fail MESSAGE: a mistake of the caller.
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

note() { printf '%s\n' "$*" >&2; }

# quoted WORD...: the words as a shell would have to read them.
quoted() {
    local word line="" quote="'\\''"
    for word in "$@"; do
        case $word in
        "" | *[!A-Za-z0-9_@%+=:,./-]*) word="'${word//\'/$quote}'" ;;
        esac
        line+="${line:+ }$word"
    done
    printf '%s' "$line"
}

# run COMMAND...: runs it, or with --dry-run prints it.
run() {
    if [ -n "$dry_run" ]; then
        printf '%s\n' "$(quoted "$@")"
    else
        "$@"
    fi
}
