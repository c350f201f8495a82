#include "client/core/extent_list.h"

#include <algorithm>

#include "client/core/chunk_writer.h"
#include "client/core/reader.h"
#include "proto/common/checksum.h"
#include "proto/common/units.h"
#include "proto/wire/codec.h"
#include "proto/wire/wire.pb.h"

namespace cairn::client {
namespace {

constexpr std::uint32_t kPageBytesMax = kMiB;
constexpr std::uint32_t kRootBytesMax = 16 * kMiB;

std::uint64_t run_bytes(const wire::ExtentRun& run) {
  return static_cast<std::uint64_t>(run.count() - 1) * run.chunk_bytes() + run.last_bytes();
}

Failure damaged(std::string what) {
  return fail(Errc::kDataLoss, "its list of extents: " + std::move(what));
}

}  // namespace

ExtentList::ExtentList(OwnerId owner, Limits limits)
    : owner_(owner), limits_(limits), root_(std::make_unique<wire::ExtentRoot>()) {}
ExtentList::~ExtentList() = default;

void ExtentList::add(const format::Extent& extent) {
  if (open_ && open_->chunk == extent.chunk && open_->length == extent.offset) {
    open_->length += extent.length;
    return;
  }
  close();
  open_ = extent;
}

void ExtentList::close() {
  if (!open_) return;
  add_run(*open_, owner_, runs_);
  open_.reset();
  // The last one may still grow.
  if (runs_.size() > limits_.page_runs) end_page(limits_.page_runs);
}

void ExtentList::end_page(std::size_t count) {
  wire::ExtentPage page;
  auto& entry = *root_->add_pages();
  entry.set_first(first_);
  for (std::size_t i = 0; i < count; ++i) {
    first_ += run_bytes(runs_[i]);
    *page.add_runs() = std::move(runs_[i]);
  }
  runs_.erase(runs_.begin(), runs_.begin() + static_cast<std::ptrdiff_t>(count));
  const auto bytes = wire::encode(page);
  entry.set_offset(list_bytes_);
  entry.set_bytes(static_cast<std::uint32_t>(bytes.size()));
  entry.set_crc32c(crc32c(bytes));
  list_bytes_ += bytes.size();
  ready_ += bytes;
}

bool ExtentList::finish() {
  close();
  if (root_->pages_size() == 0 && runs_.size() <= limits_.inline_runs) return false;
  if (!runs_.empty()) end_page(runs_.size());
  const auto bytes = wire::encode(*root_);
  root_bytes_ = static_cast<std::uint32_t>(bytes.size());
  root_digest_ = sha256(bytes);
  list_bytes_ += bytes.size();
  ready_ += bytes;
  return true;
}

void ExtentList::fill(wire::ObjectSeal& seal, const std::vector<format::Extent>& stored,
                      const std::vector<std::uint64_t>& writers) const {
  if (root_bytes_ == 0) {
    seal.mutable_runs()->Assign(runs_.begin(), runs_.end());
    return;
  }
  auto& pages = *seal.mutable_pages();
  std::vector<wire::ExtentRun> runs;
  to_runs(stored, owner_, runs);
  pages.mutable_runs()->Assign(runs.begin(), runs.end());
  pages.set_bytes(list_bytes_);
  pages.set_root_bytes(root_bytes_);
  pages.set_root_digest(root_digest_);
  pages.mutable_writers()->Assign(writers.begin(), writers.end());
}

ExtentMap::ExtentMap() = default;
ExtentMap::~ExtentMap() = default;

Result<std::shared_ptr<ExtentMap>> ExtentMap::from(const wire::ObjectInfo& info) {
  std::shared_ptr<ExtentMap> map(new ExtentMap);
  TRY(map->owner_, OwnerId::from_bytes(info.owner()));
  map->size_ = info.size();
  if (!info.has_pages()) {
    map->runs_.assign(info.runs().begin(), info.runs().end());
    return map;
  }
  const auto& pages = info.pages();
  if (pages.root_bytes() == 0 || pages.root_bytes() > pages.bytes() || pages.root_bytes() > kRootBytesMax)
    return damaged("a root of " + std::to_string(pages.root_bytes()) + " of " + std::to_string(pages.bytes()) +
                   " bytes");
  map->pages_ = std::make_unique<wire::ExtentPages>(pages);
  return map;
}

Task<std::string> ExtentMap::read(std::shared_ptr<Session> session, std::uint64_t offset, std::uint64_t length,
                                  rt::Duration timeout) const {
  const std::vector<wire::ExtentRun> runs(pages_->runs().begin(), pages_->runs().end());
  CO_TRY(auto extents, extents_in(runs, owner_, offset, length));
  std::string out(length, '\0');
  CO_CHECK_OK(
      co_await read_extents(std::move(session), std::move(extents), std::as_writable_bytes(std::span(out)), timeout));
  co_return out;
}

Task<void> ExtentMap::load_root(std::shared_ptr<Session> session, rt::Duration timeout) {
  const auto pages_bytes = pages_->bytes() - pages_->root_bytes();
  CO_TRY(const auto bytes, co_await read(std::move(session), pages_bytes, pages_->root_bytes(), timeout));
  if (sha256(bytes) != pages_->root_digest()) co_return damaged("the root does not match the object's record");
  auto root = std::make_shared<wire::ExtentRoot>();
  CO_CHECK_OK(wire::decode(bytes, *root, "root of a list of extents"));
  std::uint64_t at = 0, next = 0;
  for (const auto& page : root->pages()) {
    if (page.offset() != at || page.bytes() == 0 || page.bytes() > kPageBytesMax || page.bytes() > pages_bytes - at ||
        page.first() < next || page.first() >= size_)
      co_return damaged("the root's pages do not follow one another");
    at += page.bytes();
    next = page.first() + 1;
  }
  if (at != pages_bytes || root->pages_size() == 0 || root->pages(0).first() != 0)
    co_return damaged("the root does not name all pages");
  root_ = std::move(root);
  co_return {};
}

Task<std::shared_ptr<const ExtentMap::Page>> ExtentMap::page(std::shared_ptr<Session> session, std::size_t number,
                                                             rt::Duration timeout) {
  for (const auto& [which, kept] : kept_)
    if (which == number) co_return kept;
  const auto root = root_;
  const auto& entry = root->pages(static_cast<int>(number));
  CO_TRY(const auto bytes, co_await read(std::move(session), entry.offset(), entry.bytes(), timeout));
  if (crc32c(bytes) != entry.crc32c())
    co_return damaged("page " + std::to_string(number) + " does not match its checksum");
  wire::ExtentPage decoded;
  CO_CHECK_OK(wire::decode(bytes, decoded, "page of a list of extents"));
  auto page = std::make_shared<Page>();
  page->first = entry.first();
  page->runs.assign(decoded.runs().begin(), decoded.runs().end());
  if (kept_.size() == kKept) kept_.erase(kept_.begin());
  kept_.emplace_back(number, page);
  co_return page;
}

Task<std::vector<format::Extent>> ExtentMap::find(std::shared_ptr<ExtentMap> self, std::shared_ptr<Session> session,
                                                  std::uint64_t offset, std::uint64_t length, rt::Duration timeout) {
  if (!self->pages_) co_return extents_in(self->runs_, self->owner_, offset, length);
  if (!self->root_) CO_CHECK_OK(co_await self->load_root(session, timeout));
  const auto root = self->root_;
  std::vector<format::Extent> out;
  while (length > 0) {
    const auto& pages = root->pages();
    const auto after = std::upper_bound(pages.begin(), pages.end(), offset,
                                        [](std::uint64_t at, const auto& page) { return at < page.first(); });
    const auto end = after == pages.end() ? self->size_ : after->first();
    CO_TRY(const auto page, co_await self->page(session, static_cast<std::size_t>(after - pages.begin()) - 1, timeout));
    const auto size = std::min(length, end - offset);
    CO_TRY(const auto extents, extents_in(page->runs, self->owner_, offset - page->first, size));
    out.insert(out.end(), extents.begin(), extents.end());
    offset += size;
    length -= size;
  }
  co_return out;
}

}  // namespace cairn::client
