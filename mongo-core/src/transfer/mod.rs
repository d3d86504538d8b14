//! Moving documents: what backup, migration and resharding share, each piece written once.
//!
//! | room | what it does |
//! |---|---|
//! | [`catalog`] | reads and recreates collections and indexes exactly, from raw `listCollections` to raw `create` |
//! | [`partition`] | cuts a collection into `_id` ranges without losing mixed types |
//! | [`partition::Key::compare`] | the order of `_id`s in an index |
//! | [`scan`] | raw batches of one range, restarted from the last key, with memory bounded in bytes |
//! | [`write`](mod@write) | raw bulk writes with an outcome for every document that was refused |
//! | [`written`] | which documents of an interrupted write are there |
//! | [`compare`] | two copies of a collection, down to the `_id`s that differ |
//! | [`oplog`] | what has changed on a replica set, in order and without a hole; transactions put together |
//! | [`replay`] | applies what an oplog tells, many operations at a time |
//! | [`majority`] | waits once for a majority instead of after every batch |
//!
//! Documents travel as the bytes that the server sent: nothing on the way decodes and encodes them, so duplicate field
//! names, NaN payloads and whatever a newer server adds arrive unchanged.

pub mod catalog;
pub mod compare;
pub mod majority;
pub mod oplog;
mod order;
pub mod partition;
mod ranges;
pub mod replay;
pub mod scan;
pub mod write;
pub mod written;

pub(crate) mod raw;

pub(crate) use order::exact_number;
pub use raw::{check_structure, leading_id, without};
