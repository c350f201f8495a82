#!/usr/bin/env bash
# Includes follow the arrows between the layers. Prints nothing when they do.
#   tests/checks/layers.sh [ROOT]
#
#   proto/common <- proto/rt <- proto <- storage <- server      storage/format <- client      bench (but disk, plan and open), examples: public headers
set -euo pipefail
cd "${1:-$(dirname "$0")/../..}"

find proto storage server client bench -name '*.h' -o -name '*.cc' -o -name '*.proto' 2> /dev/null | LC_ALL=C sort | perl -ne '
  BEGIN {
    # The first pattern that matches a file says which of our headers it may include, and which libraries.
    @rules = (
      [qr{^proto/common/include/},  qr{^cairn/result\.h$}],
      [qr{^proto/common/},          qr{^(proto/common/|cairn/result\.h$)}],
      [qr{^proto/rt/},              qr{^proto/(common|rt)/}],
      [qr{^proto/},                 qr{^proto/}],
      [qr{^storage/format/},        qr{^(proto|storage/format)/}],
      [qr{^storage/},               qr{^(proto|storage)/}],
      [qr{^server/},                qr{^(proto|storage|server)/}],
      [qr{^client/api/include/},    qr{^cairn/}],
      [qr{^client/examples/},       qr{^(cairn|client/examples)/}],
      [qr{^client/},                qr{^(proto|storage/format|client|cairn)/}],
      [qr{^bench/(plan|open)/},     qr{^(proto|storage/format|client/core|bench)/}],
      [qr{^bench/disk/},            qr{^(proto|storage|bench)/}],
      [qr{^bench/},                 qr{^(cairn|bench)/}],
    );
    @ours = qr{^(proto|storage|server|client|bench|tests|cairn)/};
    $asio = "client/api/include/cairn/asio.h";  # made for users of Asio
    $bad = 0;
  }
  chomp;
  my $file = $_;
  my ($rule) = grep { $file =~ $_->[0] } @rules or next;
  open my $in, "<", $file or die "$file: $!";
  while (my $line = <$in>) {
    my $header;
    if ($line =~ /^\s*#\s*include\s*[<"]([^>"]+)[>"]/) { $header = $1 }
    elsif ($file =~ /\.proto$/ && $line =~ /^\s*import\s+(?:public\s+)?"([^"]+)"/) { $header = $1 }
    else { next }
    my $why;
    if ($header =~ $ours[0]) {
      $why = "not below it" unless $header =~ $rule->[1];
    } elsif ($header =~ m{^\.\./|/\.\./}) {
      $why = "write includes from the top of the tree";
    }
    # Types of big libraries stay in sources: whoever includes a header would pay for them. An adaptor may have a
    # header of its own; the one that bears its name is for others.
    my $own = $file =~ m{^(?:proto/runtime|proto/wire|storage/disk|storage/index)/(\w+)\.h$} && $file !~ m{/(\w+)/\1\.h$};
    if ($file =~ /\.h$/ && !$own && $file ne $asio && $header =~ m{^(rocksdb/|liburing|google/protobuf/|asio)|\.pb\.h$}) { $why = "a library of the sources, not of headers" }
    if ($file =~ m{^client/} && $header =~ m{^(rocksdb/|liburing)}) { $why = "a client links without it" }
    if ($why) {
      print "$file:$.: includes $header: $why\n";
      $bad = 1;
    }
  }
  END { $? = $bad }
'
