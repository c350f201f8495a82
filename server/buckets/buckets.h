#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "proto/rt/seams.h"
#include "proto/rt/sync.h"
#include "server/coordinator/coordinator.h"
#include "server/usage/usage.h"
#include "storage/record_store/record_store.h"

namespace cairn::wire {
class BucketCreate;
class BucketInfo;
class BucketList;
class BucketListReply;
class BucketRemove;
class BucketSet;
class BucketShow;
class Empty;
}  // namespace cairn::wire
namespace cairn::records {
class Bucket;
}

namespace cairn::server {

/// Buckets, and the right to add something to one. The bucket's record and what is in it lie in different home groups,
/// which no transaction spans; a Use keeps the bucket from being removed while something is added.
///
/// Threads: the loop.
class Buckets {
  struct State;

 public:
  Buckets(rt::Runtime runtime, storage::RecordStore& records, const Coordinator& coordinator, Usage& usage)
      : runtime_(runtime), records_(records), coordinator_(coordinator), usage_(usage) {}

  /// errors: kInvalid  name or policy, also more copies than there are targets;  kExists
  Task<wire::Empty> create(wire::BucketCreate request);
  /// errors: kNotFound
  Task<wire::BucketInfo> show(wire::BucketShow request);
  /// All, by name.
  Task<wire::BucketListReply> list(wire::BucketList request);
  /// Changes the policy. A quota below what the bucket holds keeps what is there and refuses more. Nothing is removed
  /// by the policy before any more once this is answered. errors: kNotFound  also when the bucket meant is gone;
  /// kConflict  changed since it was shown;  kInvalid
  Task<wire::BucketInfo> set(wire::BucketSet request);
  /// Removes an empty bucket: one without objects, steps and open attempts. Records of its runs go with it.
  /// errors: kNotFound  also when the bucket meant is gone;  kConflict  names something that is in it
  Task<wire::Empty> remove(wire::BucketRemove request);

  class Use {
   public:
    Use(Use&& other) noexcept = default;
    Use& operator=(Use&&) = delete;
    ~Use();
    std::uint32_t copies() const { return copies_; }  // of the bucket's policy

   private:
    friend class Buckets;
    explicit Use(std::shared_ptr<State> state);
    std::shared_ptr<State> state_;
    std::uint32_t copies_ = 1;
  };
  /// Hold it from before the decision until the transaction has been answered.
  /// errors: kInvalid  name;  kNotFound
  Task<Use> use(std::string bucket);

 private:
  /// Alone with the bucket: nobody uses it as long as this lives.
  class Alone;
  Task<std::unique_ptr<Alone>> alone(std::string bucket);
  Task<void> check_empty(std::string bucket);
  Task<void> forget_runs(std::string bucket);
  void fill(const std::string& bucket, const records::Bucket& record, wire::BucketInfo& out) const;

  rt::Runtime runtime_;
  storage::RecordStore& records_;
  const Coordinator& coordinator_;
  Usage& usage_;
  std::map<std::string, std::weak_ptr<State>> in_use_;
};

}  // namespace cairn::server
