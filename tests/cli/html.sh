# shellcheck shell=sh disable=SC2154
# What the reports have in common; sourced behind lib.sh.

# whole FILE: is well-formed and loads nothing.
whole() {
    ! command -v xmllint >/dev/null || xmllint --noout "$1" 2>"$tmp/err" || complain "$1 is not well-formed"
    [ "$(tail -1 "$1")" = "</html>" ] || complain "$1 has no end"
    ! grep -n '<script\|<link\|<img\|<iframe\|src=\|@import\|url(' "$1" >"$tmp/err" || complain "$1 loads something"
    ! grep -o 'href *= *.[^ ]*' "$1" | grep -v "href='#" >"$tmp/err" || complain "$1 has links"
    grep -o 'https\{0,1\}://[^" >]*' "$1" | grep -v '^http://www.w3.org/' >"$tmp/err" && complain "$1 names a host"
    [ -z "$(grep -o "id='[^']*'" "$1" | sort | uniq -d)" ] || complain "$1 has an id twice"
}
# pictures FILE COUNT: has so many, or says what is missing as often.
pictures() {
    if command -v gnuplot >/dev/null; then
        [ "$(grep -c '^<svg' "$1")" = "$2" ] || complain "$1 has not $2 pictures"
        [ "$(grep -c '</svg>' "$1")" = "$2" ] || complain "$1 has pictures without an end"
        ! grep -q 'class="missing"' "$1" || complain "$1: a picture is missing"
    else
        [ "$(grep -c 'gnuplot-nox' "$1")" = "$2" ] || complain "$1 does not say what is missing"
    fi
}
