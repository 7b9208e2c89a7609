#!/usr/bin/env perl
# Runs a shell command line through errand-boy's text protocol.
#
#     perl text.pl SOCKET 'COMMAND LINE' < input

use strict;
use warnings;
use IO::Socket::UNIX;

my $end = "\r\n\r\n";

# Returns the output, the errors, and the return code, negative for a signal.
sub run {
    my ($path, $line, $input) = @_;
    # What ends in CR LF would end two bytes too early: the daemon takes the first end that comes.
    index($_ . $end, $end) == length or
        die "the text protocol carries nothing that holds CR LF CR LF or ends in CR LF\n"
        for $line, $input;
    local $SIG{PIPE} = 'IGNORE';
    my $socket = IO::Socket::UNIX->new(Peer => $path) or die "$path: $!\n";
    binmode $socket;
    print $socket $line, $end, $input, $end;
    $socket->flush;
    my $answer = do { local $/; readline $socket };
    # The output may hold anything, so the split is at the last "\r\n1:".
    $answer =~ /\A\r\n0:(.*)\r\n1:(.*)\r\n\r\n(-?\d+)\r\n\r\n\z/s
        or die "the daemon has closed the connection early\n";
    return ($1, $2, $3);
}

die "usage: perl text.pl SOCKET 'COMMAND LINE'\n" if @ARGV != 2;
binmode $_ for *STDIN, *STDOUT, *STDERR;
my $input = -t STDIN ? '' : do { local $/; readline(STDIN) // '' };
my ($stdout, $stderr, $code) = eval { run(@ARGV, $input) };
if ($@) {
    print STDERR "text.pl: $@";
    exit 125;
}
print STDOUT $stdout;
print STDERR $stderr;
exit($code < 0 ? 128 - $code : $code);
