//! Every bound of the system, with its reason. A bound is answered by a typed refusal or by back-pressure, never by
//! dropping what was acknowledged.

use crate::rate::Rate;

// Sessions at a gateway.

/// Unanswered sends of one connection; then its stream is not read. 256 fill a bundle several times over. A run may pass
/// this and the next one by its own length ([`RUN_SENDS`]).
pub const SESSION_SENDS_IN_FLIGHT: usize = 256;
/// The same, sends included that do not count because their shard gives no answer.
pub const SESSION_SENDS_HELD: usize = 4 * SESSION_SENDS_IN_FLIGHT;
/// A shard that answers none of a session's sends for so long is stuck for it, in ms: its sends leave the window to
/// the others, and further ones get a retryable refusal. Several times what an answer takes, less than most elections.
pub const STUCK_SHARD_MS: u64 = 1_000;
/// Conversations whose sends a gateway holds back after a retryable refusal; beyond it `apply` tells what is out of
/// order.
pub const SESSION_HELD_BACK: usize = 1_024;
/// Sends of one device in a second, and at once: no device of a person comes near, and a bulk sender gets what a shard
/// can do (design: 110 k proposals a second, unbundled). Keeps one device from taking more than a shard.
pub const DEVICE_SENDS: Rate = Rate { per_s: 50_000, burst: 100_000 };
/// Bytes of these frames, in a second and at once: with 256 bytes each, a fifth of this is the rate above.
pub const DEVICE_SEND_BYTES: Rate = Rate { per_s: 64 * 1024 * 1024, burst: 64 * 1024 * 1024 };
/// What a send costs more that is refused because its sender is no participant, or there is no such conversation, in
/// sends: it leaves a small row for ever. With the rate above 100 a second.
pub const STRANGERS_SEND_COST: u64 = 500;
/// Calls, subscriptions and cursor moves of one connection in a second, in frames, and at once: all subscriptions that
/// a session may have, twice; in the long run as many reads as one session can make over one connection.
pub const CONNECTION_CALLS: Rate = Rate { per_s: 10_000, burst: 20_000 };
/// Sessions that one user opens at one gateway in a second, and at once: all his devices may come back several times in
/// a row. Each costs an entry in his shard.
pub const USER_SESSIONS: Rate = Rate { per_s: 50, burst: 1_000 };
/// Callers whose rates a gateway remembers: those who spent something lately.
pub const RATES_REMEMBERED: usize = 100_000;
/// How often a session looks whether its token has expired, at the latest, in ms: clocks may be set.
pub const TOKEN_CHECK_MS: u64 = 60 * 60 * 1_000;
/// Unanswered calls (`Request`) of one connection; each may answer with a whole frame.
pub const SESSION_CALLS_IN_FLIGHT: usize = 8;
/// Bytes of a session nonce.
pub const SESSION_NONCE_BYTES: usize = 16;
/// Event bytes that may be out before the first `Credit`, unless `Resume` says otherwise.
pub const SESSION_CREDIT_BYTES: u64 = 256 * 1024;
/// The most event bytes that a device may allow to be out: about what resume's 1 MiB window holds.
pub const SESSION_MAX_CREDIT_BYTES: u64 = 1024 * 1024;
/// Bytes of frames that wait in a gateway for one device, pages under way included; beyond it the device's streams
/// fall back to catching up.
pub const SESSION_QUEUE_BYTES: usize = 128 * 1024;
/// Event bytes of one pulled page: several fit into the queue, so that one stream cannot keep the others waiting.
pub const SESSION_PAGE_BYTES: usize = 32 * 1024;
/// Pages that one session may have under way.
pub const SESSION_PULLS: usize = 4;
/// Conversations of one session: as many as a `Resume` frame can name.
pub const SESSION_SUBSCRIPTIONS: usize = 10_000;
/// How long cursor moves wait for others, in ms.
pub const CURSOR_COALESCE_MS: u64 = 250;
/// Cursor moves in one command: about 100 KiB with the longest ids stay below a command's limit.
pub const CURSOR_MOVES_PER_COMMAND: usize = 512;
/// Unanswered requests of one device's session, those that wait for their turn included: a caller that has more is not
/// waiting for answers.
pub const DEVICE_REQUESTS: usize = 256;
/// Cursors in one frame of a device: with the longest ids they stay far below the smallest frame limit.
pub const DEVICE_CURSORS_PER_FRAME: usize = 100;
/// Unanswered proposals of one gateway for one shard.
pub const PIPE_ENTRIES: usize = 8_192;
/// Bytes of the same.
pub const PIPE_BYTES: usize = 8 * 1024 * 1024;

// The store of a broker.

/// Operations that wait for the WAL thread; each is an append round of one shard, so this is many rounds of all.
pub const WAL_QUEUE_OPERATIONS: usize = 4_096;
/// Bytes of entries that wait for the WAL thread: a second of a slow disk; then appends wait.
pub const WAL_QUEUE_BYTES: usize = 64 * 1024 * 1024;
/// Operations in one batch: beyond it a larger batch saves nothing and delays its first entry.
pub const WAL_BATCH_OPERATIONS: usize = 1_024;
/// Entries that openraft reads for replication in one go.
pub const LOG_READ_ENTRIES: usize = 256;
/// Bytes of the same: several of the peer protocol's messages.
pub const LOG_READ_BYTES: usize = 512 * 1024;
/// How much further than its bound a shard's tail may grow while its entries are not applied, as a factor.
pub const TAIL_SLACK: usize = 4;
/// Jobs that wait for the apply thread; a shard has one of entries at a time.
pub const APPLY_QUEUE_JOBS: usize = 4_096;
/// Entries in one job, so that no shard keeps the others waiting.
pub const APPLY_JOB_ENTRIES: usize = 64;
/// Bytes of entries in one job.
pub const APPLY_JOB_BYTES: usize = 512 * 1024;
/// Reads that wait behind a shard whose rows are being loaded; more are refused.
pub const APPLY_PARKED_CALLS: usize = 4_096;
/// Rows that are loaded in one go for a shard that waits for them.
pub const LOAD_KEYS: usize = 4_096;
/// Prefetch hints that wait for the loader; more are dropped, since a hint may be.
pub const LOAD_QUEUE_HINTS: usize = 256;
/// Rows that move back into the cache per lock of their shard after a checkpoint: well under a millisecond.
pub const DRAIN_ROWS: usize = 512;
/// Bytes of event records that may wait for a flush of the state instance before it starts at once.
pub const FLUSH_BYTES: u64 = 32 * 1024 * 1024;
/// Bytes of its newest log that a broker keeps for slower replicas though checkpoints cover it, over all shards: what is
/// kept is merged and written again, and 4,096 shards with 64 MiB each would fill a disk.
pub const KEPT_LOG_BYTES: u64 = 256 * 1024 * 1024;
/// A shard keeps as much at least: twice what may be under way to a follower ([`APPEND_BYTES_IN_FLIGHT`]), so that a
/// stream that breaks does not end in a snapshot.
pub const KEPT_LOG_SHARE_BYTES: u64 = 2 * APPEND_BYTES_IN_FLIGHT as u64;
/// Bytes of one chunk of a snapshot, by one row at most exceeded.
pub const SNAPSHOT_CHUNK_BYTES: usize = 256 * 1024;
/// No chunk that a peer sends may be longer: one chunk and the largest block.
pub const SNAPSHOT_MAX_CHUNK_BYTES: usize = 4 * 1024 * 1024;
/// Bytes of a cluster id.
pub const CLUSTER_ID_BYTES: usize = 128;

// Commands.

/// Bytes of a body, whatever is configured: the record's own bound.
pub const MAX_BODY_BYTES: usize = stentor_proto::record::MAX_BODY_BYTES;
/// Bytes of a body unless configured otherwise: fits a default frame with its ids. Files do not travel in messages.
pub const DEFAULT_MAX_BODY_BYTES: usize = 60 * 1024;
/// Bytes of a content type; real ones with parameters stay below 100.
pub const MAX_CONTENT_TYPE_BYTES: usize = 128;
/// Bytes of an encoded command: the largest body with the longest ids, inside a bundle of its own.
pub const MAX_COMMAND_BYTES: usize = stentor_proto::bundle::MAX_BYTES - stentor_proto::bundle::PREFIX_BYTES - 4;
/// Sends in one run: what a device has ready goes together, and two runs fill a connection's window.
pub const RUN_SENDS: usize = 128;
/// Bytes of bodies after which a run closes: a few of them fill a bundle.
pub const RUN_BYTES: usize = 16 * 1024;
/// Items that one `OutboxDone` removes.
pub const OUTBOX_DONE_ITEMS: usize = 1_024;

/// How long what is ready may wait for the answers of more that is in flight, in ms, so that it goes in fewer runs. An
/// answer takes about as long within a data centre; a person never notices it.
pub const RUN_LINGER_MS: u64 = 2;

// Bundles.

/// A bundle closes at this size; a larger command travels alone.
pub const BUNDLE_CLOSE_BYTES: usize = 32 * 1024;
/// A bundle closes when its first command has waited this long, unless the shard is idle: then at once, but for those who
/// are about to come back (`echo`); for them it waits no longer either.
pub const BUNDLE_WAIT: std::time::Duration = std::time::Duration::from_millis(2);
/// Free bytes that an arena for event records gets at once: one allocation for a bundle's worth of records.
pub const RECORD_ARENA_BYTES: usize = 64 * 1024;

// Exactly once.

/// Sends of one (device, conversation) whose answers the device has not stored. Their row has results for up to twice as
/// many: answered ones leave it half a row at a time.
pub const MAX_OPEN_SENDS: u64 = 1_024;
/// How long a scope keeps a client id, in ms (24 h).
pub const CLIENT_KEY_KEPT_MS: u64 = 24 * 60 * 60 * 1_000;
/// Client ids that a scope keeps.
pub const CLIENT_KEYS_PER_SCOPE: u64 = 100_000;
/// Bytes that a scope's client ids may take, each counted with [`CLIENT_KEY_COST_BYTES`].
pub const CLIENT_KEY_BYTES_PER_SCOPE: u64 = 8 * 1024 * 1024;
/// What a client id costs besides its own bytes. A frozen part of the state: replicas must evict alike.
pub const CLIENT_KEY_COST_BYTES: u64 = 32;
/// How far ahead of the stamp `first_try_ms` may lie, in ms (5 min).
pub const FIRST_TRY_AHEAD_MS: u64 = 5 * 60 * 1_000;
/// Keys that one insert drops at most: bounded work, and more than one insert can bring over a bound.
pub const EVICTIONS_PER_INSERT: usize = 4;

// Conversations.

/// Participants of a group: everyone may write, so everyone's device is woken.
pub const MAX_GROUP_PARTICIPANTS: u32 = 10_000;
/// Participants of a channel: few write, many read.
pub const MAX_CHANNEL_PARTICIPANTS: u32 = 1_000_000;
/// Participants that `Create` may name: each is an event and two rows in one apply step; the rest is added later.
pub const MAX_CREATE_PARTICIPANTS: usize = 2_000;
/// Times that one user may have been a participant: each is a stretch in his row.
pub const MAX_STAYS: usize = 64;

// Users.

/// Devices of a user.
pub const MAX_DEVICES_PER_USER: u32 = 256;
/// Conversations in a user's list.
pub const MAX_CONVERSATIONS_PER_USER: u32 = 100_000;
/// Cursor rows of a user, of all his devices.
pub const MAX_CURSORS_PER_USER: u32 = 1_000_000;
/// Old nonces that a device remembers, so that a replayed hello of a superseded session is told so.
pub const SUPERSEDED_NONCES: usize = 16;

// The meta shard.

/// Shards of a cluster, the meta shard apart.
pub const MAX_SHARDS: u32 = 4_096;
/// Replicas of a shard, those that a move adds included.
pub const MAX_REPLICAS: usize = 7;
/// Entries that a learner may lack when it becomes a voter: a few times what is under way to a follower that keeps up
/// ([`BUNDLES_IN_FLIGHT`]), so that constant writing cannot keep it out.
pub const PROMOTE_LAG_ENTRIES: u64 = 64;
/// Signing keys of an app: a rotation needs two.
pub const MAX_SIGNING_KEYS: usize = 16;
/// Bytes of a public key in PEM.
pub const MAX_KEY_PEM_BYTES: usize = 2 * 1024;
/// Bytes of a name or an address in the meta shard.
pub const MAX_META_TEXT_BYTES: usize = 256;
/// Connections of one gateway, unless its operator says otherwise: about 1 GB of idle connections.
pub const GATEWAY_CONNECTIONS: usize = 20_000;
/// What a frame needs beside a send's body: ids, a content type, a client id.
pub const FRAME_OVERHEAD_BYTES: usize = 4 * 1024;
/// The longest client frame that any configuration may allow: the largest event record in a frame of its own.
pub const MAX_CLIENT_FRAME_BYTES: usize = 2 * 1024 * 1024;
/// Conversations of one shard that are watched at one gateway: as many as 20 bits number, beside 12 for the shard.
pub const GATEWAY_SHARD_CONVERSATIONS: usize = 1 << 20;
/// How long a gateway looks for a shard's leader before it answers `UNAVAILABLE`, or `OUTCOME_UNKNOWN` for what it has
/// sent, in ms. Longer than an election.
pub const ANSWER_WITHIN_MS: u64 = 10_000;
/// A leader that a gateway waits for and that says nothing for so long is looked for elsewhere, in ms.
pub const SILENT_LEADER_MS: u64 = 3_000;
/// Beats of a shard may be missing for so long before a gateway routes anew, in ms: three of them.
pub const MISSED_BEATS_MS: u64 = 1_500;
/// Bytes of live pushes that wait for one session's task; what comes on top is pulled later.
pub const INBOX_PUSH_BYTES: usize = 64 * 1024;
/// Bytes of frames that wait for one broker's stream. Pipes and queries keep them far below it; a stream that gets
/// there is stuck and is opened anew.
pub const LINK_QUEUE_BYTES: usize = 64 * 1024 * 1024;
/// Conversations in one question for heads: its answer stays near 64 KiB.
pub const HEADS_PER_QUERY: usize = 256;
/// Conversations in one page of a user's list.
pub const LIST_PAGE: u32 = 100;

// Between brokers.

/// What a heartbeat or a vote counts as in a queue, in bytes.
pub const PEER_SMALL_FRAME_BYTES: usize = 128;
/// Bytes that wait for one peer on one lane before replication to it pauses: a few full windows.
pub const PEER_QUEUE_BYTES: usize = 4 * 1024 * 1024;
/// The largest gRPC message between nodes: a batch of 64 KiB and one append request of the largest bundle.
pub const PEER_MESSAGE_BYTES: usize = 8 * 1024 * 1024;
/// Append requests of one shard to one peer without an answer; a slow fsync must not stop the next ones.
pub const APPENDS_IN_FLIGHT: usize = 64;
/// Bytes of the same: what a follower must hold in memory for one shard at most.
pub const APPEND_BYTES_IN_FLIGHT: usize = 4 * 1024 * 1024;
/// Requests of one peer on one lane that a broker works on; then the stream is not read.
pub const PEER_REQUESTS_IN_FLIGHT: usize = 4_096;

// A shard's leader.

/// Bundles of one shard under way: more only grow the queue inside of Raft.
pub const BUNDLES_IN_FLIGHT: usize = 16;
/// Commands that wait in one shard's batcher, then they are refused (`OVERLOADED`).
pub const BATCHER_COMMANDS: usize = 16_384;
/// Bytes of the same.
pub const BATCHER_BYTES: usize = 16 * 1024 * 1024;

// A gateway's stream at a broker.

/// Bytes of live events that wait for one gateway; what comes beyond is dropped and its head remembered.
pub const GATEWAY_LIVE_BYTES: usize = 8 * 1024 * 1024;
/// Reads, lookups and registrations of one gateway under way; then its stream is not read.
pub const GATEWAY_CALLS_IN_FLIGHT: usize = 256;
/// Conversations with interest of one gateway at one broker.
pub const GATEWAY_INTERESTS: usize = 2_000_000;
/// Event bytes of one page, whatever the caller asks for.
pub const PAGE_BYTES: usize = 256 * 1024;
/// Items of one page.
pub const PAGE_ITEMS: usize = 4_096;
/// How often a leader tells a gateway that it still leads, in ms.
pub const SHARD_BEAT_MS: u64 = 500;
/// A shard in which nothing happened for so long parks, in ms. Waking costs its first command one more round between
/// brokers, so that a shard with a message every few seconds had better stay awake.
pub const PARK_AFTER_MS: u64 = 10_000;

// Calls of the public API.

/// How long a call looks for a leader before it is refused (`UNAVAILABLE`, or `OUTCOME_UNKNOWN` once an attempt may
/// have been applied), in ms.
pub const CALL_PATIENCE_MS: u64 = 10_000;
/// Calls of one broker to another that have no answer yet.
pub const FORWARDED_CALLS: usize = 4_096;
/// Outbox items that one shard's leader carries at once.
pub const OUTBOX_IN_FLIGHT: usize = 64;
/// Pause before a stream or a registration with a retryable refusal is tried again, in ms: an election takes as long.
pub const RETRY_MS: u64 = 500;
