#include "tests/sim/history.h"

#include <algorithm>

namespace cairn::sim {

namespace {

std::string seconds(History::Time t) {
  const auto nanos = (t.time_since_epoch() - std::chrono::hours(1)).count();
  auto text = std::to_string(nanos / 1000);
  while (text.size() < 7) text.insert(0, "0");
  return text.insert(text.size() - 6, ".");
}
std::string name(Tag tag) {
  return "launch " + std::to_string(tag.launch) + " save " + std::to_string(tag.operation);
}

}  // namespace

void History::violation(std::string promise, std::string what) {
  violations_.push_back({std::move(promise), "run " + run_ + ": " + std::move(what)});
}

std::string History::name(const Save& save) const {
  return "step " + std::to_string(save.step) + " of " + sim::name(save.tag);
}

// ---- Launches

void History::open_called(std::uint32_t launch, Opening how, Time now) {
  auto [it, fresh] = launches_.try_emplace(launch);
  if (fresh) {
    it->second.how = how;
    it->second.called = now;
  }
}

void History::open_answered(std::uint32_t launch, std::optional<std::uint64_t> resume, Time called, Time now) {
  auto& l = launches_[launch];
  if (l.opened) {
    if (l.resume != resume)
      violation("P4", "launch " + std::to_string(launch) + " was told to resume from two different steps");
    return;
  }
  for (const auto& [other, o] : launches_)
    if (other > launch && o.opened && *o.opened < called)
      violation("P4", "launch " + std::to_string(launch) + " opened the run after the newer launch " +
                          std::to_string(other) + " had");
  l.opened = now;
  l.resume = resume;
  // The answer was fixed at one moment since the first call. What was highest then is what it names.
  if (!l.how.resume) highest_is(resume, l.called, now);
  if (resume) existed_[*resume].push_back({l.called, now});
}

bool History::opened(std::uint32_t launch) const {
  auto it = launches_.find(launch);
  return it != launches_.end() && it->second.opened.has_value();
}

std::uint32_t History::newest_opened() const {
  for (auto it = launches_.rbegin(); it != launches_.rend(); ++it)
    if (it->second.opened) return it->first;
  return 0;
}

History::Time History::fenced_at(std::uint32_t launch) const {
  auto at = rt::kNever;
  for (const auto& [other, o] : launches_)
    if (other > launch && o.opened) at = std::min(at, *o.opened);
  return at;
}

// ---- Saves

History::Save* History::find(std::uint64_t step, Tag tag) {
  for (auto& save : saves_)
    if (save.step == step && save.tag == tag) return &save;
  return nullptr;
}

void History::begin_called(std::uint64_t step, Tag tag, SaveKind kind, Time now) {
  if (find(step, tag) == nullptr) saves_.push_back({step, tag, kind, now, {}, {}});
}

void History::begin_answered(std::uint64_t step, Tag tag, std::string attempt, Time called, Time now) {
  if (fenced_at(tag.launch) < called)
    violation("P4", "begin of step " + std::to_string(step) + " of " + sim::name(tag) + ", called at " +
                        seconds(called) + ", was accepted though a newer launch had opened the run at " +
                        seconds(fenced_at(tag.launch)));
  auto [it, fresh] = attempts_.try_emplace(std::move(attempt), Attempt{step, tag, false, false});
  if (!fresh && (it->second.step != step || it->second.tag.launch != tag.launch))
    violation("P4", "one attempt joined by step " + std::to_string(step) + " of " + sim::name(tag) + " and step " +
                        std::to_string(it->second.step) + " of " + sim::name(it->second.tag));
}

History::Time History::last_moment(const Save& save) const {
  auto last = save.acked.value_or(save.ended.value_or(rt::kNever));
  return std::min(last, std::max(fenced_at(save.tag.launch), save.begin));
}
History::Time History::last_moment(const Delete& d) {
  return d.acked.value_or(d.ended.value_or(rt::kNever));
}

/// May a deletion of `step` have taken effect in (after, before)?
bool History::delete_possible(std::uint64_t step, Time after, Time before) const {
  return std::any_of(deletes_.begin(), deletes_.end(),
                     [&](const Delete& d) { return d.covers(step) && d.begin < before && last_moment(d) > after; });
}

void History::committed(std::uint64_t step, Tag tag, const std::string& attempt, Time now) {
  auto* save = find(step, tag);
  if (save == nullptr)
    return violation("P4",
                     "step " + std::to_string(step) + " of " + sim::name(tag) + " was acknowledged but never begun");
  if (auto it = attempts_.find(attempt); it != attempts_.end()) {
    if (it->second.failed) violation("P7", name(*save) + ": one attempt was told both failed and committed");
    it->second.committed = true;
  }
  if (save->acked) return;
  save->acked = now;
  if (save->kind.bad) violation("P2", name(*save) + " was committed though its boxes leave a gap or overlap");
  check_one_commit(*save, now);
  check_fence(*save, now);
}

void History::failed(std::uint64_t step, Tag tag, const std::string& attempt, Time now) {
  auto it = attempts_.find(attempt);
  if (it == attempts_.end()) return;
  it->second.failed = true;
  if (it->second.committed)
    violation("P7", "step " + std::to_string(step) + " of " + sim::name(tag) +
                        ": one attempt was told both committed and failed");
}

void History::gave_up(std::uint64_t step, Tag tag, Time now) {
  if (auto* save = find(step, tag); save != nullptr && !save->acked && !save->ended) save->ended = now;
}

void History::check_one_commit(const Save& save, Time now) {
  if (save.kind.overwrite) return;
  for (const auto& other : saves_) {
    if (&other == &save || other.step != save.step || !other.acked || other.kind.overwrite) continue;
    const auto since = std::min(other.begin, save.begin);
    if (!delete_possible(save.step, since, now))
      violation("P4", "two saves committed the same step: " + name(other) + " and " + name(save));
  }
}

/// A launch that opened without asking for a step was told the highest one of that moment. A higher one of an older
/// launch that exists afterwards was committed after that moment.
void History::check_fence(const Save& save, Time now) {
  for (const auto& [launch, l] : launches_) {
    if (launch <= save.tag.launch || !l.opened || l.how.resume) continue;
    if (l.resume && *l.resume >= save.step) continue;
    if (!delete_possible(save.step, save.begin, *l.opened))
      violation("P4", name(save) + " was committed after launch " + std::to_string(launch) +
                          " had opened the run (told to resume from " +
                          (l.resume ? std::to_string(*l.resume) : "nothing") + ")");
  }
}

// ---- Deletions

std::size_t History::delete_called(std::uint64_t step, bool after, Time now) {
  deletes_.push_back({step, after, now, {}, {}});
  return deletes_.size() - 1;
}

void History::delete_ended(std::size_t number, Deleted outcome, Time now) {
  auto& d = deletes_[number];
  if (outcome == Deleted::kYes) d.acked = now;
  if (outcome == Deleted::kNo) d.ended = Time::min();  // at no moment
}

// ---- Observations

void History::saw(std::uint64_t step, Tag tag, Time asked, Time answered) {
  auto* save = find(step, tag);
  if (save == nullptr || save->begin > answered)
    return violation("P2", "step " + std::to_string(step) + " shows " + sim::name(tag) + ", which was never begun");
  if (save->kind.bad) violation("P2", name(*save) + " is visible though its boxes leave a gap or overlap");
  if (!save->acked && save->ended && *save->ended < asked)
    violation("P7", name(*save) + " is visible though each of its attempts was told failed");
  // Superseded for certain?
  const auto last = last_moment(*save);
  for (const auto& other : saves_)
    if (other.step == step && other.tag != tag && other.acked && other.begin > last && *other.acked < asked)
      violation("P1", name(*save) + " is visible though " + name(other) + " replaced it");
  for (const auto& d : deletes_)
    if (d.covers(step) && d.acked && d.begin > last && *d.acked < asked)
      violation("P2", name(*save) + " is visible though it was removed");
  // A fenced launch's save that was not there, once fenced, can not come back.
  for (const auto& earlier : seen_[step])
    if (earlier.tag != tag && fenced_at(tag.launch) < earlier.asked && earlier.answered < asked)
      violation("P4", name(*save) + " became visible after a newer launch had opened the run; before, " +
                          sim::name(earlier.tag) + " was visible");
  for (const auto& [launch, l] : launches_)
    if (launch > tag.launch && l.opened && !l.how.resume && (!l.resume || *l.resume < step) && *l.opened < asked)
      violation("P4", name(*save) + " is visible though launch " + std::to_string(launch) +
                          " opened the run when it did not exist");
  seen_[step].push_back({asked, answered, tag});
  existed_[step].push_back({asked, answered});
}

void History::saw_absent(std::uint64_t step, Time asked, Time answered) {
  for (const auto& save : saves_)
    if (save.step == step && save.acked && *save.acked < asked && !delete_possible(step, save.begin, answered))
      violation("P1",
                name(save) + " was acknowledged at " + seconds(*save.acked) + " and is absent at " + seconds(answered));
  for (const auto& e : existed_[step])
    if (e.answered < asked && !delete_possible(step, e.asked, answered))
      violation("P2", "step " + std::to_string(step) + " was there at " + seconds(e.answered) + " and is absent at " +
                          seconds(answered));
}

bool History::may_be_gone(std::uint64_t step, Time asked, Time answered) const {
  if (delete_possible(step, asked, answered)) return true;
  return std::any_of(saves_.begin(), saves_.end(), [&](const Save& s) {
    return s.step == step && s.kind.overwrite && s.begin < answered && last_moment(s) > asked;
  });
}

void History::highest_is(std::optional<std::uint64_t> step, Time asked, Time answered) {
  std::set<std::uint64_t> above;
  for (const auto& save : saves_)
    if (!step || save.step > *step) above.insert(save.step);
  for (auto s : above) saw_absent(s, asked, answered);
}

void History::saw_highest(std::optional<std::uint64_t> step, Time asked, Time answered) {
  highest_is(step, asked, answered);
}

void History::saw_steps(const std::vector<std::uint64_t>& steps, std::optional<std::uint64_t> after, Time asked,
                        Time answered) {
  std::set<std::uint64_t> known;
  for (const auto& save : saves_)
    if (!after || save.step > *after) known.insert(save.step);
  for (auto s : known)
    if (std::find(steps.begin(), steps.end(), s) == steps.end()) saw_absent(s, asked, answered);
  for (auto s : steps)
    if (!known.contains(s)) violation("P2", "step " + std::to_string(s) + " is listed but was never begun");
}

std::size_t History::commits() const {
  return static_cast<std::size_t>(
      std::count_if(saves_.begin(), saves_.end(), [](auto& s) { return s.acked.has_value(); }));
}

std::set<std::uint64_t> History::steps() const {
  std::set<std::uint64_t> out;
  for (const auto& save : saves_) out.insert(save.step);
  return out;
}

bool History::may_exist(std::uint64_t step) const {
  return std::any_of(saves_.begin(), saves_.end(), [&](const Save& s) { return s.step == step; });
}

std::string History::text() const {
  auto moment = [](const std::optional<Time>& t) { return t && *t != Time::min() ? seconds(*t) : std::string("-"); };
  std::string out = "history of run " + run_ + "\n";
  for (const auto& [number, l] : launches_)
    out += "  launch " + std::to_string(number) + " called " + seconds(l.called) + " opened " + moment(l.opened) +
           " resume " + (l.resume ? std::to_string(*l.resume) : "-") +
           (l.how.resume ? " (asked for " + std::to_string(*l.how.resume) + ")" : "") +
           (l.how.discard_after ? " discarding" : "") + "\n";
  for (const auto& s : saves_)
    out += "  " + name(s) + " begun " + seconds(s.begin) + " acknowledged " + moment(s.acked) + " given up " +
           moment(s.ended) + (s.kind.overwrite ? " overwrite" : "") + (s.kind.bad ? " bad" : "") + "\n";
  for (const auto& d : deletes_)
    out += std::string("  remove ") + (d.after ? "after " : "") + std::to_string(d.step) + " called " +
           seconds(d.begin) + " done " + moment(d.acked) + " without effect " + moment(d.ended) + "\n";
  return out;
}

}  // namespace cairn::sim
