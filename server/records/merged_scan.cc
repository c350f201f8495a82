#include "server/records/merged_scan.h"

#include <utility>

namespace cairn::server {

MergedScan::MergedScan(storage::RecordStore& records, std::string prefix, std::string after, std::size_t page)
    : records_(records), prefix_(std::move(prefix)), after_(std::move(after)), page_(page), groups_(kHomeGroups) {}

Task<void> MergedScan::refill(HomeGroup number) {
  auto& group = groups_[number];
  if (group.at == group.page.size()) {
    if (group.ended) co_return {};
    const auto from = group.page.empty() ? after_ : group.page.back().key;
    CO_TRY(group.page, co_await records_.scan(number, prefix_, from, page_));
    group.at = 0;
    group.ended = group.page.size() < page_;
    if (group.page.empty()) co_return {};
  }
  heads_.emplace(group.page[group.at].key, number);
  co_return {};
}

Task<void> MergedScan::skip(std::string after) {
  after_ = after;
  while (!heads_.empty() && heads_.begin()->first <= after) {
    const auto number = heads_.begin()->second;
    heads_.erase(heads_.begin());
    auto& group = groups_[number];
    while (group.at < group.page.size() && group.page[group.at].key <= after) ++group.at;
    // A page that lies before it all says nothing of where the group goes on.
    if (group.at == group.page.size()) {
      group.page.clear();
      group.at = 0;
    }
    CO_CHECK_OK(co_await refill(number));
  }
  co_return {};
}

Task<std::optional<storage::Record>> MergedScan::next() {
  if (!started_) {
    started_ = true;
    for (HomeGroup group = 0; group < kHomeGroups; ++group) CO_CHECK_OK(co_await refill(group));
  }
  if (heads_.empty()) co_return std::nullopt;
  const auto number = heads_.begin()->second;
  heads_.erase(heads_.begin());
  auto& group = groups_[number];
  // The key stays in the page: it is where the next page of the group begins.
  auto& head = group.page[group.at++];
  storage::Record record{.key = head.key, .value = std::move(head.value), .version = head.version};
  CO_CHECK_OK(co_await refill(number));
  co_return std::move(record);
}

}  // namespace cairn::server
