# Breaches of cl/runtime/types.clh's rules for barriers, as FILE:LINE: SENTENCE. The first passes over the
# files learn which functions hold a barrier, the last (pass=2) finds where they stand. Relies on the
# code's layout: one statement a line, bodies begin with "{" at the end of a line.

function holds_barrier(line, holder) {
    if (line ~ /(^|[^a-z_])(group_)?barrier\(/) return 1
    for (holder in holders)
        if (line ~ ("(^|[^A-Za-z0-9_])" holder "\\(")) return 1
    return 0
}

function complain(sentence) { print FILENAME ":" FNR ": " sentence }

function check_place(i) {
    if (returned) complain("a barrier after a return")
    if (head ~ /^(static|inline) /) complain("a barrier in a static or inline function")
    for (i = 1; i <= depth; i++)
        if (kind[i] == "if") break
    if (i <= depth || lone_if || line ~ /^ *(else )?if \(.*\) [a-z_]+.*;/ || line ~ /[?&|] .*\(.*:/)
        complain("a barrier under a condition")
}

FNR == 1 { inside = depth = returned = lone_if = 0; head = "" }
/^ *(\/?\*|\/\/|#)/ { next }
{ line = $0; sub(/\/\*.*\*\//, "", line); sub(/ *\\$/, "", line) }

# Functions that a macro of group.clh makes.
!inside && line ~ /^(GROUP_(TREE|INTEGER)|TEAM_TREE)\(/ {
    name = line
    sub(/^[A-Z_]*\(/, "", name)
    sub(/,.*/, "", name)
    holders[name] = 1
    next
}
!inside && line ~ /^[A-Za-z_].*\(/ && line !~ /^KERNEL\(/ {
    name = head = line
    sub(/\(.*/, "", name)
    sub(/.*[ *]/, "", name)
}
!inside && head != "" && line ~ /\) \{$/ { inside = 1; depth = returned = lone_if = 0; next }
inside && /^}/ { inside = 0; head = ""; next }
!inside { next }

holds_barrier(line) { holders[name] = 1; if (pass == 2) check_place() }
line ~ /(^|[^a-z_])return[ ;]/ { returned = 1 }
{
    lone_if = line ~ /^ *(else if \(.*\)|if \(.*\)|else)$/
    if (line ~ /^ *\}/ && depth > 0) depth--
    if (line ~ /\{$/) kind[++depth] = line ~ /^ *(\} )?(else|if)[ (]/ ? "if" : "other"
}
