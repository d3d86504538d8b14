//! A sharded cluster.

use super::declare::{as_is, counter, labelled, worked_out};
use crate::metric::{Kind, Metric, Unit};

pub(super) const METRICS: &[Metric] = &[
    counter(
        "mongodb_migrations_total",
        "Moves of chunks that this member took part in",
        Unit::None,
        &["result"],
        &[
            labelled("shardingStatistics.countDonorMoveChunkStarted", &["donated_started"]),
            labelled("shardingStatistics.countDonorMoveChunkCommitted", &["donated"]),
            labelled("shardingStatistics.countDonorMoveChunkAborted", &["donated_aborted"]),
            labelled("shardingStatistics.countRecipientMoveChunkStarted", &["received_started"]),
        ],
    ),
    counter(
        "mongodb_stale_config_errors_total",
        "Requests by a router that did not know where data is",
        Unit::None,
        &[],
        &[as_is("shardingStatistics.countStaleConfigErrors")],
    ),
    worked_out(
        "mongodb_balancer_enabled",
        "Whether the balancer may move chunks",
        Kind::Gauge,
        Unit::None,
        &[],
        "balancerStatus: mode",
    ),
    worked_out(
        "mongodb_balancer_running",
        "Whether the balancer is moving chunks",
        Kind::Gauge,
        Unit::None,
        &[],
        "balancerStatus: inBalancerRound",
    ),
    worked_out(
        "mongodb_shard_state",
        "What a shard is to its cluster",
        Kind::StateSet,
        Unit::None,
        &["shard", "state"],
        "listShards: state, draining",
    ),
    worked_out(
        "mongodb_shard_member_up",
        "Whether a router reaches a member of a shard",
        Kind::Gauge,
        Unit::None,
        &["shard", "member"],
        "connPoolStats: replicaSets",
    ),
    worked_out(
        "mongodb_shard_pool_connections",
        "Connections of a router to members of shards",
        Kind::Gauge,
        Unit::None,
        &["member", "state"],
        "connPoolStats: hosts",
    ),
    worked_out("mongodb_shard_documents", "Documents of a shard", Kind::Gauge, Unit::None, &["shard"], "dbStats: raw.objects"),
    worked_out("mongodb_chunks", "Chunks of a shard", Kind::Gauge, Unit::None, &["shard"], "config.chunks"),
    worked_out(
        "mongodb_jumbo_chunks",
        "Chunks that are too large to be moved",
        Kind::Gauge,
        Unit::None,
        &["shard"],
        "config.chunks: jumbo",
    ),
];
