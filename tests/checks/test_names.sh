#!/usr/bin/env bash
# CMake splits lists at semicolons: a test whose name has one becomes two that run nothing and pass.
#   tests/checks/test_names.sh [ROOT]
set -euo pipefail
cd "${1:-$(dirname "$0")/../..}"

find tests -name '*.cc' | LC_ALL=C sort | xargs perl -0777 -ne '
  while (/TEST_CASE(?:_METHOD)?\(\s*(?:\w+,\s*)?"([^"]*;[^"]*)"/g) {
    my $line = 1 + (substr($_, 0, $-[0]) =~ tr/\n//);
    print "$ARGV:$line: a semicolon in the name of the test \"$1\"; ctest would not run it\n";
    $bad = 1;
  }
  END { $? = $bad // 0 }
'
