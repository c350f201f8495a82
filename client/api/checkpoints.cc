#include <algorithm>
#include <cstdlib>
#include <map>

#include "client/api/handles.h"
#include "client/core/steps.h"

namespace cairn {

static_assert(static_cast<int>(DType::boolean) == static_cast<int>(format::DType::kBool));
static_assert(static_cast<int>(DType::bf16) == static_cast<int>(format::DType::kBF16));
static_assert(static_cast<int>(DType::u64) == static_cast<int>(format::DType::kU64));
format::DType to_core(DType dtype) {
  return static_cast<format::DType>(dtype);
}
DType from_core(format::DType dtype) {
  return static_cast<DType>(dtype);
}

StepInfo from_core(const client::StepSummary& s) {
  return {
      s.step,  s.world_size, s.data_bytes, s.tensors, s.blobs, s.committed_unix_nanos, {s.launch.job, s.launch.restart},
      s.pinned};
}

Result<std::pair<std::string, std::string>> split_run(const std::string& name) {
  const auto slash = name.find('/');
  if (slash == std::string::npos || slash == 0 || slash + 1 == name.size())
    return fail(Errc::kInvalid, "run '" + name + "': must be BUCKET/RUN");
  return std::pair{name.substr(0, slash), name.substr(slash + 1)};
}

Result<client::Launch> resolve_launch(const LaunchId& launch) {
  if (!launch.job.empty()) return client::Launch{launch.job, launch.restart};
  const auto number = [](const char* name) -> std::uint64_t {
    const char* text = std::getenv(name);
    return text ? std::strtoull(text, nullptr, 10) : 0;
  };
  const auto text = [](const char* name) -> std::string {
    const char* value = std::getenv(name);
    return value ? value : "";
  };
  if (auto own = text("CAIRN_LAUNCH"); !own.empty()) {
    const auto colon = own.rfind(':');
    if (colon == std::string::npos) return client::Launch{own, 0};
    const auto digits = own.substr(colon + 1);
    if (colon == 0 || digits.empty() || digits.find_first_not_of("0123456789") != std::string::npos)
      return fail(Errc::kInvalid, "CAIRN_LAUNCH='" + own + "': must be JOB or JOB:RESTART_COUNT");
    return client::Launch{own.substr(0, colon), std::strtoull(digits.c_str(), nullptr, 10)};
  }
  if (auto torch = text("TORCHELASTIC_RUN_ID"); !torch.empty())
    return client::Launch{torch, number("TORCHELASTIC_RESTART_COUNT")};
  if (auto slurm = text("SLURM_JOB_ID"); !slurm.empty()) return client::Launch{slurm, number("SLURM_RESTART_COUNT")};
  return fail(Errc::kInvalid,
              "no launch id: set RunOptions::launch, or CAIRN_LAUNCH=JOB:RESTART, the same on all ranks and higher "
              "after a restart");
}

Result<std::shared_ptr<StepImpl>> wrap(std::shared_ptr<ClientImpl> client,
                                       Result<std::shared_ptr<client::StepReader>> reader) {
  if (!reader) return fail(std::move(reader).error());
  auto info = from_core((*reader)->summary());
  return std::make_shared<StepImpl>(StepImpl{std::move(client), std::move(*reader), std::move(info)});
}

// ---- Run ----

std::optional<std::uint64_t> Run::resume_step() const {
  return impl_->opened.resume;
}
const std::string& Run::name() const {
  return impl_->name;
}

Future<Save> Run::save_async(SaveOptions options, bool wait) {
  auto run = impl_;
  auto started = run->client->async<std::shared_ptr<client::SaveAttempt>>([run, options, wait] {
    const auto& tuning = run->client->options_;
    auto attempt = client::SaveAttempt::start(run->client->session_, *run->client->arena_, run->opened,
                                              {options.step, options.rank, options.world_size, options.overwrite,
                                               options.explicit_commit, options.declared_bytes, options.stage_first},
                                              {tuning.chunks_in_flight, tuning.arena_wait, tuning.timeout});
    return [](std::shared_ptr<client::SaveAttempt> self, bool waits) -> Task<std::shared_ptr<client::SaveAttempt>> {
      if (waits) CO_CHECK_OK(co_await self->begun());
      co_return self;
    }(std::move(attempt), wait);
  });
  return convert<Save>(started, [run, options](std::shared_ptr<client::SaveAttempt> attempt) -> Result<Save> {
    Save save;
    save.impl_ = std::make_shared<SaveImpl>(SaveImpl{run->client, std::move(attempt), options.rank});
    return save;
  });
}
Future<Save> Run::begin_save_async(SaveOptions options) {
  return save_async(options, true);
}
Result<Save> Run::start_save(SaveOptions options) {
  if (impl_->client->on_loop_thread())
    return fail(Errc::kInvalid, "start_save inside a callback: use begin_save_async");
  return save_async(options, false).get();
}
Result<Save> Run::begin_save(SaveOptions options) {
  if (impl_->client->on_loop_thread())
    return fail(Errc::kInvalid, "begin_save inside a callback: use begin_save_async");
  return begin_save_async(options).get();
}

Result<Step> Run::open_step(std::optional<std::uint64_t> step) {
  auto run = impl_;
  TRY(auto opened, wrap(run->client, run->client->call<std::shared_ptr<client::StepReader>>([run, step] {
        return client::StepReader::open(run->client->session_, run->opened.bucket, run->opened.run, step,
                                        run->client->timeout());
      })));
  Step out;
  out.impl_ = std::move(opened);
  return out;
}
Result<Restore> Run::restore(std::optional<std::uint64_t> step) {
  TRY(auto opened, open_step(step));
  return opened.restore();
}

// ---- Save ----

Result<void> Save::add_tensor(TensorShard shard, std::span<const std::byte> bytes) {
  format::ShardEntry entry;
  entry.tensor = std::move(shard.name);
  entry.dtype = to_core(shard.dtype);
  entry.global_shape = shard.global_shape;
  entry.box = shard.box ? format::Box{shard.box->offset, shard.box->shape} : format::whole(shard.global_shape);
  if (shard.holder) entry.holder = format::Holder{shard.holder->index, shard.holder->count};
  return impl_->attempt->add_tensor(std::move(entry), bytes);
}
Result<void> Save::add_blob(std::string name, std::span<const std::byte> bytes) {
  return impl_->attempt->add_blob(std::move(name), bytes);
}
Result<void> Save::add_token(std::string stream, std::span<const std::byte> bytes) {
  std::string copy(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  return impl_->attempt->add_token(std::move(stream), std::move(copy));
}
Result<void> Save::add_meta(MetaItem item) {
  return impl_->attempt->add_meta({std::move(item.scope), std::move(item.key), std::move(item.value)});
}

Future<Save::Ticket> Save::stage_async() {
  auto save = impl_;
  auto staged = save->client->async<bool>(
      [save]() -> Task<bool> {
        return [](std::shared_ptr<SaveImpl> held) -> Task<bool> {
          CO_CHECK_OK(co_await held->attempt->stage(true));
          co_return held->attempt->survives();
        }(save);
      },
      false);
  return convert<Ticket>(staged, [save](bool survives) -> Result<Ticket> {
    Ticket ticket;
    ticket.impl_ = std::make_shared<TicketImpl>(TicketImpl{save, survives});
    return ticket;
  });
}
Result<Save::Ticket> Save::stage() {
  if (impl_->client->on_loop_thread()) return fail(Errc::kInvalid, "stage inside a callback: use stage_async");
  return stage_async().get();
}
Result<void> Save::stage_part() {
  return impl_->client->call<void>([save = impl_] { return save->attempt->stage(false); }, false);
}

Future<SaveResult> Save::Ticket::wait_async() {
  auto save = impl_->save;
  auto waiting = save->client->async<client::SaveOutcome>([save] { return save->attempt->outcome(rt::kNever); });
  return convert<SaveResult>(waiting,
                             [](client::SaveOutcome o) -> Result<SaveResult> { return SaveResult{o.step, o.bytes}; });
}
Result<SaveResult> Save::Ticket::wait() {
  if (impl_->save->client->on_loop_thread()) return fail(Errc::kInvalid, "wait inside a callback: use wait_async");
  return wait_async().get();
}
Result<SaveResult> Save::Ticket::wait_for(std::chrono::milliseconds timeout) {
  auto save = impl_->save;
  auto waited = save->client->call<client::SaveOutcome>(
      [save, timeout] { return save->attempt->outcome(save->client->loop().now() + timeout); });
  if (!waited) return fail(std::move(waited).error());
  return SaveResult{waited->step, waited->bytes};
}
bool Save::Ticket::survives() const {
  return impl_->survives;
}
bool Save::Ticket::ready() const {
  auto save = impl_->save;
  return save->client
      ->call<bool>(
          [save]() -> Task<bool> { return [](bool ended) -> Task<bool> { co_return ended; }(save->attempt->ended()); })
      .value_or(false);
}

Future<SaveResult> Save::commit_async() {
  auto save = impl_;
  auto committed = save->client->async<client::SaveOutcome>([save] {
    return [](std::shared_ptr<SaveImpl> held) -> Task<client::SaveOutcome> {
      CO_CHECK_OK(co_await held->attempt->commit(held->client->deadline()));
      co_return co_await held->attempt->outcome(rt::kNever);
    }(save);
  });
  return convert<SaveResult>(committed,
                             [](client::SaveOutcome o) -> Result<SaveResult> { return SaveResult{o.step, o.bytes}; });
}
Result<SaveResult> Save::commit() {
  if (impl_->client->on_loop_thread()) return fail(Errc::kInvalid, "commit inside a callback: use commit_async");
  return commit_async().get();
}
Result<void> Save::abort(std::string reason) {
  return impl_->client->call<void>(
      [save = impl_, reason] { return save->attempt->abort(reason, save->client->deadline()); });
}
std::string Save::attempt() const {
  // In a callback there is no waiting, and mostly no need to.
  if (impl_->client->on_loop_thread()) return impl_->attempt->has_begun() ? impl_->attempt->owner().hex() : "";
  return impl_->client
      ->call<std::string>([save = impl_] {
        return [](std::shared_ptr<client::SaveAttempt> attempt) -> Task<std::string> {
          CO_CHECK_OK(co_await attempt->begun());
          co_return attempt->owner().hex();
        }(save->attempt);
      })
      .value_or("");
}

// ---- Step, Restore ----

const StepInfo& Step::info() const {
  return impl_->info;
}

namespace {

Result<format::Contents> find(const std::shared_ptr<StepImpl>& step, std::vector<format::Query> queries) {
  return step->client->call<format::Contents>([step, queries] { return step->reader->find(queries); });
}

}  // namespace

Result<std::vector<TensorInfo>> Step::tensors() {
  TRY(auto contents, find(impl_, {{format::Kind::kShard, "", true, std::nullopt}}));
  std::vector<TensorInfo> out;
  std::map<std::string, std::size_t> at;
  for (const auto& shard : contents.shards) {
    const auto [known, fresh] = at.emplace(shard.tensor, out.size());
    if (fresh) {
      TRY(auto count, format::elements(shard.global_shape));
      TRY(auto bytes, format::bytes_of(shard.dtype, count));
      out.push_back({shard.tensor, from_core(shard.dtype), shard.global_shape, bytes, {}});
    }
    auto& boxes = out[known->second].boxes;
    const Box box{shard.box.offset, shard.box.shape};
    // The holders of a replicated box are one box.
    if (boxes.empty() || boxes.back().offset != box.offset || boxes.back().shape != box.shape) boxes.push_back(box);
  }
  return out;
}
Result<std::vector<BlobInfo>> Step::blobs() {
  TRY(auto contents, find(impl_, {{format::Kind::kBlob, "", true, std::nullopt}}));
  std::vector<BlobInfo> out;
  for (const auto& blob : contents.blobs) out.push_back({blob.name, blob.rank, blob.size});
  return out;
}
Result<std::vector<MetaItem>> Step::meta() {
  TRY(auto contents, find(impl_, {{format::Kind::kMeta, "", true, std::nullopt}}));
  std::vector<MetaItem> out;
  for (const auto& m : contents.meta) out.push_back({m.scope, m.key, m.value});
  return out;
}
Result<std::vector<std::byte>> Step::blob(std::string name, std::uint32_t rank) {
  TRY(auto contents, find(impl_, {{format::Kind::kBlob, name, false, std::nullopt}}));
  for (auto& entry : contents.blobs) {
    if (entry.rank != rank) continue;
    TRY(auto text, impl_->client->call<std::string>([step = impl_, entry] { return step->reader->blob(entry); }));
    const auto* data = reinterpret_cast<const std::byte*>(text.data());
    return std::vector<std::byte>(data, data + text.size());
  }
  return fail(Errc::kNotFound,
              "step " + std::to_string(info().step) + " has no blob '" + name + "' of rank " + std::to_string(rank));
}
Result<std::vector<std::byte>> Step::token(std::string stream) {
  TRY(auto contents, find(impl_, {{format::Kind::kToken, stream, false, std::nullopt}}));
  if (contents.tokens.empty())
    return fail(Errc::kNotFound, "step " + std::to_string(info().step) + " has no token of stream '" + stream + "'");
  const auto& text = contents.tokens.front().bytes;
  const auto* data = reinterpret_cast<const std::byte*>(text.data());
  return std::vector<std::byte>(data, data + text.size());
}
Restore Step::restore() {
  Restore out;
  out.impl_ = std::make_shared<RestoreImpl>(RestoreImpl{impl_, {}, {}});
  return out;
}

namespace {

Result<RestoreResult> result_of(client::ReadStats s) {
  return RestoreResult{s.bytes_wanted, s.bytes_moved, s.bytes_from_disk};
}

}  // namespace

Result<RestoreResult> Step::verify(std::function<void(std::uint64_t, std::uint64_t)> progress) {
  TRY(auto stats,
      impl_->client->call<client::ReadStats>([step = impl_, progress] { return step->reader->verify(progress); }));
  return result_of(stats);
}

void Restore::want(TensorSlice slice, std::span<std::byte> out) {
  client::StepReader::Wanted wanted{std::move(slice.name), std::nullopt};
  if (slice.box) wanted.box = format::Box{slice.box->offset, slice.box->shape};
  impl_->wanted.push_back(std::move(wanted));
  impl_->out.push_back(out);
}
Future<RestoreResult> Restore::run_async() {
  auto restore = impl_;
  auto read = restore->step->client->async<client::ReadStats>(
      [restore] { return restore->step->reader->restore(restore->wanted, restore->out); });
  return convert<RestoreResult>(read, [](client::ReadStats s) { return result_of(s); });
}
Result<RestoreResult> Restore::run() {
  if (impl_->step->client->on_loop_thread()) return fail(Errc::kInvalid, "restore inside a callback: use run_async");
  return run_async().get();
}

// ---- Client: runs and steps ----

Future<Run> Client::open_run_async(RunOptions options) {
  auto client = impl_;
  auto opened = client->async<client::OpenedRun>([client, options]() -> Task<client::OpenedRun> {
    return [](std::shared_ptr<ClientImpl> impl, RunOptions asked) -> Task<client::OpenedRun> {
      CO_TRY(auto names, split_run(asked.name));
      CO_TRY(auto launch, resolve_launch(asked.launch));
      client::OpenRunRequest request{names.first, names.second, launch, asked.resume, asked.discard_after};
      co_return co_await client::open_run(impl->session_, std::move(request), impl->deadline());
    }(client, options);
  });
  return convert<Run>(opened, [client, name = options.name](client::OpenedRun run) -> Result<Run> {
    Run out;
    out.impl_ = std::make_shared<RunImpl>(RunImpl{client, std::move(run), name});
    return out;
  });
}
Result<Run> Client::open_run(RunOptions options) {
  if (impl_->on_loop_thread()) return fail(Errc::kInvalid, "open_run inside a callback: use open_run_async");
  return open_run_async(std::move(options)).get();
}

Future<Step> Client::open_step_async(std::string run, std::optional<std::uint64_t> step) {
  auto client = impl_;
  auto opened = client->async<std::shared_ptr<client::StepReader>>([client, run, step] {
    return [](std::shared_ptr<ClientImpl> impl, std::string name,
              std::optional<std::uint64_t> number) -> Task<std::shared_ptr<client::StepReader>> {
      CO_TRY(auto names, split_run(name));
      co_return co_await client::StepReader::open(impl->session_, names.first, names.second, number, impl->timeout());
    }(client, run, step);
  });
  return convert<Step>(opened, [client](std::shared_ptr<client::StepReader> reader) -> Result<Step> {
    TRY(auto wrapped, wrap(client, std::move(reader)));
    Step out;
    out.impl_ = std::move(wrapped);
    return out;
  });
}
Result<Step> Client::open_step(std::string run, std::optional<std::uint64_t> step) {
  if (impl_->on_loop_thread()) return fail(Errc::kInvalid, "open_step inside a callback: use open_step_async");
  return open_step_async(std::move(run), step).get();
}

Result<Page<std::string>> Client::runs(std::string bucket, std::string after, std::uint32_t limit) {
  TRY(auto page, impl_->call<client::RunPage>([impl = impl_.get(), bucket, after, limit] {
    return client::list_runs(impl->session_, bucket, after, limit, impl->deadline());
  }));
  return Page<std::string>{std::move(page.runs), page.more};
}
Result<Page<StepInfo>> Client::steps(std::string run, std::optional<std::uint64_t> after, std::uint32_t limit) {
  TRY(auto names, split_run(run));
  TRY(auto page, impl_->call<client::StepPage>([impl = impl_.get(), names, after, limit] {
    return client::list_steps(impl->session_, names.first, names.second, after, limit, impl->deadline());
  }));
  Page<StepInfo> out{{}, page.more};
  for (const auto& s : page.steps) out.items.push_back(from_core(s));
  return out;
}
Result<void> Client::remove_step(std::string run, std::uint64_t step) {
  TRY(auto names, split_run(run));
  return impl_->call<void>([impl = impl_.get(), names, step] {
    return client::remove_step(impl->session_, names.first, names.second, step, impl->deadline());
  });
}
Result<std::uint64_t> Client::remove_steps_after(std::string run, std::uint64_t step,
                                                 std::function<void(std::uint64_t, std::uint64_t)> progress) {
  TRY(auto names, split_run(run));
  return impl_->call<std::uint64_t>([impl = impl_.get(), names, step, progress] {
    return client::remove_steps_after(impl->session_, names.first, names.second, step, impl->timeout(), progress);
  });
}
Result<void> Client::pin_step(std::string run, std::uint64_t step) {
  TRY(auto names, split_run(run));
  return impl_->call<void>([impl = impl_.get(), names, step] {
    return client::pin_step(impl->session_, names.first, names.second, step, true, impl->deadline());
  });
}
Result<void> Client::unpin_step(std::string run, std::uint64_t step) {
  TRY(auto names, split_run(run));
  return impl_->call<void>([impl = impl_.get(), names, step] {
    return client::pin_step(impl->session_, names.first, names.second, step, false, impl->deadline());
  });
}
Result<RunActivity> Client::activity(std::string run) {
  TRY(auto names, split_run(run));
  TRY(auto found, impl_->call<client::Activity>([impl = impl_.get(), names] {
    return client::run_activity(impl->session_, names.first, names.second, impl->deadline());
  }));
  return RunActivity{found.active, {found.launch.job, found.launch.restart}, found.step, found.ranks};
}
Result<AttemptStatus> Client::status(std::string run, std::string attempt) {
  TRY(auto names, split_run(run));
  TRY(const auto owner, owner_of_text("attempt", attempt));
  TRY(auto report, impl_->call<client::AttemptReport>([impl = impl_.get(), names, id = owner] {
    return client::attempt_status(impl->session_, names.first, names.second, id, rt::Duration{0}, impl->deadline());
  }));
  AttemptStatus out{AttemptState::unknown, report.step, report.world_size, report.sealed, report.error.message};
  switch (report.phase) {
    case client::AttemptPhase::kUnknown:
      out.state = AttemptState::unknown;
      break;
    case client::AttemptPhase::kOpen:
      out.state = AttemptState::open;
      break;
    case client::AttemptPhase::kMerging:
      out.state = AttemptState::merging;
      break;
    case client::AttemptPhase::kCommitted:
      out.state = AttemptState::committed;
      break;
    case client::AttemptPhase::kFailed:
      out.state = AttemptState::failed;
      break;
  }
  return out;
}

}  // namespace cairn
