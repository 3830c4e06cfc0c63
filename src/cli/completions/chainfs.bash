# Completion of chainfs for bash; chainfs itself tells what may follow.

_chainfs() {
    local rest=${COMP_LINE:0:COMP_POINT} words=() word blank index text about wants= candidates=()
    # bash ends words at "@", "=" and ":", too; here a word ends at a blank.
    for ((index = 0; index <= COMP_CWORD; index++)); do
        word=${COMP_WORDS[index]}
        blank=${rest%%[![:space:]]*}
        rest=${rest#"$blank"}
        ((index < COMP_CWORD)) || word=$rest
        if [[ -n $blank || index -eq 0 ]]; then
            words+=("$word")
        else
            words[${#words[@]} - 1]+=$word
        fi
        rest=${rest#"$word"}
    done
    words=("${words[@]//[\"\'\\]/}")
    local typed=${words[${#words[@]} - 1]}
    words[${#words[@]} - 1]=${typed/#\~\//$HOME/}
    while IFS=$'\t' read -r text about; do
        case $text in
            :files) wants=-f ;;
            :dirs) wants=-d ;;
            *) candidates+=("$text") ;;
        esac
    done < <("${1/#\~\//$HOME/}" complete -- "${words[@]}" 2>/dev/null)
    if [[ -n $wants ]]; then
        compopt -o filenames 2>/dev/null
        while IFS= read -r text; do
            candidates+=("$text")
        done < <(compgen "$wants" -- "$typed")
    fi
    # bash replaces what follows the last character that ends a word of its own.
    local known=${typed%"${2//[\"\'\\]/}"}
    COMPREPLY=("${candidates[@]#"$known"}")
    if [[ ${#candidates[@]} -eq 1 && ${candidates[0]} == *[=@] ]]; then
        compopt -o nospace 2>/dev/null
    fi
}

complete -F _chainfs chainfs
