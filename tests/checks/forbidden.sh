#!/usr/bin/env bash
# Logic reaches threads, clocks, randomness, sockets, files and RocksDB only through the seams (proto/rt, storage/disk,
# storage/index), so that the simulator can stand in for all of them. Prints what goes round them.
#   tests/checks/forbidden.sh [ROOT]
set -euo pipefail
cd "${1:-$(dirname "$0")/../..}"

find proto storage server client -name '*.h' -o -name '*.cc' 2> /dev/null | LC_ALL=C sort | perl -ne '
  BEGIN {
    # Folders of real adaptors and of programs: they are the world that the seams stand for.
    my $adaptors = qr{^(proto/runtime|storage/disk|server/cairnd|client/api|client/cli|client/examples)/};
    @rules = (
      # name, pattern, where it is fine, what to use
      ["threads", qr{\bstd::(jthread|thread|async|this_thread)\b|\bpthread_\w+\s*\(|<thread>|<future>|\bio_context\b|<asio},
       $adaptors, "rt::Loop, rt::Offload"],
      ["clock", qr{\b(steady|system|high_resolution)_clock::now\b|\bsteady_timer\b|\b(clock_gettime|gettimeofday|nanosleep|usleep)\s*\(|(?<![\w.>])(?:::|std::)?time\s*\(\s*(?:0|NULL|nullptr|&)},
       $adaptors, "rt::Loop::now(), sleep()"],
      ["randomness", qr{\brandom_device\b|(?<![\w.>])(?:std::)?s?rand\s*\(|\bgetrandom\s*\(|/dev/u?random},
       $adaptors, "rt::Random"],
      ["sockets", qr{<(sys/socket|sys/un|netinet/\w+|arpa/inet|netdb|sys/epoll|poll)\.h>|(?<![\w.>:])::(socket|connect|bind|listen|accept4?|send(to|msg)?|recv(from|msg)?)\s*\(},
       $adaptors, "rt::Net"],
      ["files", qr{\bstd::filesystem\b|<filesystem>|<fstream>|\bstd::[io]?fstream\b|<(fcntl|unistd|dirent|liburing|sys/stat|sys/file)\.h>|(?<![\w.>:])::(open|openat|creat|read|write|pread|pwrite|unlink|rename|mkdir|fsync|fdatasync)\s*\(|\b(fopen|openat2?|pwritev?|preadv?|fdatasync|fsync|io_uring_\w+)\s*\(},
       qr{$adaptors|^storage/index/}, "the disk seam"],
      ["RocksDB", qr{\brocksdb::|<rocksdb/}, qr{^storage/index/}, "the index seam"],
      ["printing", qr{(?<![\w.>])(?:std::)?(?:v?f?printf|puts|fputs|putchar|perror)\s*\(|\bfmt::print\b|<fmt/printf|\bstd::(cout|cerr|clog)\b|<iostream>},
       $adaptors, "rt::Log, Result"],
      # Unqualified, only as a statement: a class may have an abort() of its own.
      ["ending the process", qr{(?:std::|(?<![\w>])::)(abort|exit|_exit|_Exit|quick_exit)\s*\(|(?:^|[;\{\})])\s*(?:abort\s*\(\s*\)|(?:exit|_exit|_Exit|quick_exit)\s*\()},
       $adaptors, "Result; assert for own mistakes"],
    );
    $bad = 0;
  }
  chomp;
  my $file = $_;
  open my $in, "<", $file or die "$file: $!";
  my $in_comment = 0;
  while (my $line = <$in>) {
    # Comments and string literals are text, not calls.
    if ($in_comment) { $line =~ s{^.*?\*/}{} ? ($in_comment = 0) : next }
    $line =~ s{"(?:[^"\\]|\\.)*"}{""}g unless $line =~ /^\s*#\s*include/;
    $line =~ s{//.*}{};
    $line =~ s{/\*.*?\*/}{}g;
    if ($line =~ s{/\*.*}{}s) { $in_comment = 1 }
    for my $rule (@rules) {
      my ($name, $pattern, $fine, $instead) = @$rule;
      next if $file =~ $fine || $line !~ $pattern;
      print "$file:$.: $name: \"$&\" outside the adaptors; use $instead\n";
      $bad = 1;
    }
  }
  END { $? = $bad }
'
