#!/bin/sh
# Runs a shell command line through errand-boy's text protocol.
#
#     sh text.sh SOCKET 'COMMAND LINE' < input
#
# A shell opens no Unix sockets itself: this takes socat, an nc that has -U, or perl, whichever is
# there. The input must not hold CR LF CR LF, nor end in CR LF. Needs GNU grep.

set -eu

[ $# -eq 2 ] || { echo "usage: sh text.sh SOCKET 'COMMAND LINE'" >&2; exit 2; }
socket=$1
line=$2

# Sends its input to the socket, then copies what comes back until the other side closes.
converse() {
    if command -v socat >/dev/null; then
        socat -t 1000000 - "UNIX-CONNECT:$socket"
    elif nc -h 2>&1 | grep -q '[[:space:]]-U'; then
        nc -U "$socket"
    else
        perl -MIO::Socket::UNIX -e '
            $/ = \65536;
            my $socket = IO::Socket::UNIX->new(Peer => $ARGV[0]) or die "$ARGV[0]: $!\n";
            print $socket $_ while <STDIN>;
            $socket->flush;
            print while <$socket>;
        ' "$socket"
    fi
}

answer=$(mktemp)
trap 'rm -f "$answer"' EXIT
{
    printf '%s\r\n\r\n' "$line"
    [ -t 0 ] || cat
    printf '\r\n\r\n'
} | converse >"$answer" || : # what came tells

# At its end: CR LF CR LF, the return code, CR LF CR LF. The errors begin at the last CR LF 1:
size=$(wc -c <"$answer")
code=$(tail -c 16 "$answer" | tr -d '\r' | tail -n 2 | head -n 1)
errors=$(LC_ALL=C grep -zaboP '\r(?=\n1:)' "$answer" | tr '\0\r' '\n ' | tail -n 1 | cut -d : -f 1)
[ -n "$errors" ] || { echo "text.sh: the daemon has closed the connection early" >&2; exit 125; }

head -c "$errors" "$answer" | tail -c +5
tail -c +$((errors + 5)) "$answer" | head -c $((size - errors - 12 - ${#code})) >&2
[ "$code" -ge 0 ] || code=$((128 - code))
exit "$code"
