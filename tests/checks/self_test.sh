#!/usr/bin/env bash
# Each check is silent on a clean tree and catches every violation planted in a copy of one.
set -euo pipefail
checks="$(cd "$(dirname "$0")" && pwd)"
tree="$(mktemp -d)"
trap 'rm -rf "$tree"' EXIT
cp "$checks/../../.clang-format" "$tree/"

failed=0
# Innocent words that a careless pattern would take for a violation.
clean() {
  rm -rf "${tree:?}"/{proto,storage,server,client,bench,tests}
  mkdir -p "$tree"/{proto/{common/include/cairn,rt,runtime},storage/{format,disk,index,chunk_store},server/{objects,cairnd}} \
    "$tree"/client/{core,api/include/cairn,examples,cli} "$tree"/{bench,tests}
  cat > "$tree/storage/chunk_store/store.cc" << 'END'
#include "storage/chunk_store/store.h"

#include "proto/rt/loop.h"
#include "storage/disk/disk.h"

// std::thread and open() are named here, and "rocksdb::DB" below, only as words. /* printf( */
const char* kText = "std::filesystem::path rocksdb::DB printf(";
int Store::open(Disk& disk) {
  co_await attempt->abort("why");
  return disk.open("a") + disk.fsync + loop_.now() + randomize() + next_time(0);
}
END
  echo '#include <thread>' > "$tree/proto/runtime/loop.cc"
  echo '#include <rocksdb/db.h>' > "$tree/storage/index/rocksdb_index.cc"
  echo '#include <rocksdb/db.h>' > "$tree/storage/index/own.h"
  echo '#include <fcntl.h>' > "$tree/storage/disk/file.cc"
  printf '#include <iostream>\n\n#include "proto/runtime/loop.h"\n#include "server/objects/objects.h"\n' > "$tree/server/cairnd/main.cc"
  echo '#include "storage/format/manifest.h"' > "$tree/client/core/client.cc"
  echo '#include "cairn/result.h"' > "$tree/client/api/include/cairn/client.h"
  echo '#include <cairn/client.h>' > "$tree/client/examples/train.cc"
  echo '#include <cairn/client.h>' > "$tree/bench/main.cc"
  echo '#include "server/objects/objects.h"' > "$tree/tests/any_test.cc"
}

silent() { # check
  local output
  if ! output="$("$checks/$1.sh" "$tree" 2>&1)" || [ -n "$output" ]; then
    echo "$1: complains about a clean tree:"
    echo "$output"
    failed=1
  fi
}

planted=0
caught() { # check file line
  local output
  clean
  printf '%s\n' "$3" > "$tree/$2"
  planted=$((planted + 1))
  if output="$("$checks/$1.sh" "$tree" 2>&1)"; then
    echo "$1: passes although $2 has: $3"
    failed=1
  elif [[ "$output" != *"$2:1"* ]]; then
    echo "$1: fails on $2 with '$3', but does not say where: $output"
    failed=1
  fi
}

clean
for check in format layers forbidden test_names; do silent $check; done

caught format proto/common/a.cc 'int  f( ){return 1;}'

caught test_names tests/a.cc 'TEST_CASE("a: this; that", "[x]") {}'
caught test_names tests/a.cc 'TEMPLATE_TEST_CASE("a; b", "[x]", BOTH) {'

caught layers proto/common/a.h '#include "proto/rt/loop.h"'
caught layers proto/common/include/cairn/a.h '#include "proto/common/ids.h"'
caught layers proto/common/a.h '#include "cairn/client.h"'
caught layers proto/rt/a.h '#include "proto/wire/frame.h"'
caught layers proto/rt/a.cc '#include "storage/disk/disk.h"'
caught layers proto/wire.proto 'import "server/records/records.proto";'
caught layers storage/format/a.h '#include "storage/disk/disk.h"'
caught layers storage/disk/a.cc '#include "server/objects/objects.h"'
caught layers storage/disk/a.h '#include "client/core/client.h"'
caught layers server/objects/a.cc '#include "client/core/client.h"'
caught layers server/objects/a.cc '#include <cairn/client.h>'
caught layers client/core/a.cc '#include "server/objects/objects.h"'
caught layers client/core/a.cc '#include "storage/chunk_store/store.h"'
caught layers client/core/a.cc '#include <rocksdb/db.h>'
caught layers client/cli/a.cc '#include <liburing.h>'
caught layers client/api/include/cairn/a.h '#include "proto/common/result.h"'
caught layers client/examples/a.cc '#include "client/core/client.h"'
caught layers client/api/include/cairn/a.h '#include <asio/post.hpp>'
caught layers bench/a.cc '#include "proto/common/result.h"'
caught layers storage/index/index.h '#include <rocksdb/db.h>'
caught layers storage/chunk_store/a.h '#include <rocksdb/db.h>'
caught layers server/objects/a.h '#include "proto/wire/frame.pb.h"'
caught layers storage/disk/a.cc '#include "../index/index.h"'

for line in 'std::thread t;' 'auto f = std::async(g);' 'asio::io_context io;' '#include <thread>' \
  'auto t = std::chrono::steady_clock::now();' 'auto t = std::chrono::system_clock::now();' 'auto t = time(nullptr);' \
  'std::random_device r;' 'int r = rand();' '#include <sys/socket.h>' 'int s = ::socket(1, 2, 3);' \
  'int f = ::open("a", 0);' 'FILE* f = fopen("a", "r");' 'std::filesystem::remove(p);' 'std::ifstream in;' '#include <unistd.h>' \
  'rocksdb::DB* db;' '#include <rocksdb/db.h>' 'printf("a");' 'fmt::print("a");' 'std::cerr << 1;' 'std::abort();' '  abort();' 'if (a) abort();' 'exit(1);'; do
  caught forbidden storage/chunk_store/a.cc "$line"
done
caught forbidden storage/disk/a.cc 'rocksdb::DB* db;'
caught forbidden server/objects/a.h '#include <thread>'
caught forbidden client/core/a.cc 'auto t = std::chrono::steady_clock::now();'
caught forbidden proto/wire.cc '/* a */ std::abort();'

# The other checks take what they look at as an argument.
refused() { # what check argument...
  local what="$1" check="$2"
  shift 2
  planted=$((planted + 1))
  if "$checks/$check.sh" "$@" > /dev/null 2>&1; then
    echo "$check: passes although $what"
    failed=1
  fi
}
fine() {
  if ! "$checks/$1.sh" "${@:2}" > /dev/null 2>&1; then
    echo "$1: complains about nothing"
    failed=1
  fi
}
include="$tree/include"
mkdir -p "$include/cairn"
refused "there is no header" public_headers "$include"
echo '#include <string>' > "$include/cairn/a.h"
fine public_headers "$include"
echo 'inline std::string f() { return {}; }' > "$include/cairn/a.h"
refused "a header lacks an include" public_headers "$include"
printf '#include <expected>\ninline std::expected<int, int> f() { return 1; }\n' > "$include/cairn/a.h"
refused "a header needs C++23" public_headers "$include"

echo 'int main() {}' > "$tree/main.cc"
g++ -o "$tree/plain" "$tree/main.cc"
g++ -o "$tree/linked" "$tree/main.cc" -Wl,--no-as-needed -luring
fine client_links "$tree/plain"
refused "a program links liburing" client_links "$tree/plain" "$tree/linked"

if command -v systemd-analyze > /dev/null; then
  sed 's/^UMask=/UMusk=/' "$checks/../../deploy/cairnd.service" > "$tree/a.service"
  refused "a key is misspelt" unit "$tree/a.service"
  sed '/^\(Protect\|Restrict\|System\)/d' "$checks/../../deploy/cairnd.service" > "$tree/a.service"
  refused "the unit is wide open" unit "$tree/a.service"
fi

[ $failed = 0 ] && echo "$planted planted violations caught"
exit $failed
