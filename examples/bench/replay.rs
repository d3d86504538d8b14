//! How fast an oplog is applied: some hundreds of operations at a time, against one at a time.

use std::{path::Path, sync::Arc};

use mongo_core::{
    CancellationToken, Error, Result,
    bson::{Document, RawDocument, RawDocumentBuf, doc},
    clock::Clock as _,
    transfer::{
        oplog::{Effect, Entry, Oplog, OplogRead, Transactions},
        replay::{ApplyPath, Replay, ReplaySettings, ReplayTarget},
    },
};
use serde::Serialize;

use crate::{Bench, DATABASE, Measured, median, orders::Orders};

/// How fast one way to apply an oplog is.
#[derive(Serialize)]
pub(crate) struct Speed {
    pub(crate) what: String,
    pub(crate) operations: u64,
    pub(crate) seconds: Vec<f64>,
    pub(crate) operations_per_second: f64,
    /// Our speed over that of the row.
    pub(crate) ours_over_this: f64,
}

impl Bench {
    /// Six updates of a field, three inserts and a delete out of ten operations, applied to what was there before them.
    pub(crate) async fn replays(&self, folder: &Path) -> Result<Vec<Speed>> {
        let entries = self.record().await?;
        let peer = self.peer("mongorestore")?;
        let few = entries.len().min(FEW);
        let oplog = folder.join("oplog.bson");
        std::fs::write(&oplog, entries[..few].concat())
            .map_err(|error| Error::internal("the oplog cannot be written").with_source(error))?;
        let empty = folder.join("empty");
        std::fs::create_dir_all(&empty).map_err(|error| Error::internal("a folder cannot be made").with_source(error))?;
        let paths = [
            ("mongo-core", None),
            ("mongo-core, pipelines", Some(ApplyPath::Pipelines)),
            ("mongo-core, ourselves", Some(ApplyPath::Ourselves)),
        ];
        let mut measured: Vec<Vec<Measured>> = paths.iter().map(|_| Vec::new()).collect();
        let mut theirs = Vec::new();
        for _ in 0..self.settings.runs {
            for ((_, path), rows) in paths.iter().zip(&mut measured) {
                self.fill_and_rest().await?;
                rows.push(self.replay(&entries, *path).await?);
            }
            if let Some(peer) = &peer {
                self.fill_and_rest().await?;
                let mut command = tokio::process::Command::new(peer);
                command.args(["--quiet", "--uri", &self.uri, "--oplogReplay", "--oplogFile"]).arg(&oplog).arg(&empty);
                theirs.push(Measured { seconds: self.time(command).await?, written: None, memory: None });
            }
        }
        #[expect(clippy::cast_precision_loss, reason = "figures for a person")]
        let speed = |operations: usize, measured: &[Measured]| operations as f64 / median(measured);
        let ours = measured.first().map_or(f64::NAN, |measured| speed(entries.len(), measured));
        let mut rows: Vec<(String, usize, &[Measured])> =
            paths.iter().zip(&measured).map(|((what, _), measured)| ((*what).to_owned(), entries.len(), &measured[..])).collect();
        if peer.is_some() {
            rows.push(("mongorestore --oplogReplay".to_owned(), few, &theirs));
        }
        let table = rows.into_iter().map(|(what, operations, measured)| Speed {
            what,
            operations: operations as u64,
            seconds: measured.iter().map(|measured| measured.seconds).collect(),
            operations_per_second: speed(operations, measured),
            ours_over_this: ours / speed(operations, measured),
        });
        Ok(table.collect())
    }

    async fn fill_and_rest(&self) -> Result<()> {
        self.fill().await?;
        // A restore, ours and mongorestore's, builds indexes behind the oplog.
        self.deployment.database(DATABASE).run_command(doc! { "dropIndexes": "orders", "index": "*" }).await?;
        self.rest().await
    }

    /// What writing leaves for the server to do must not slow down what is measured.
    pub(crate) async fn rest(&self) -> Result<()> {
        self.deployment.database("admin").run_command(doc! { "fsync": 1 }).await?;
        Ok(())
    }

    /// Writes, and reads from the oplog what that came to.
    async fn record(&self) -> Result<Vec<Vec<u8>>> {
        let oplog = Oplog::of(&self.deployment)?;
        let begin = oplog.newest().await?;
        let collection = self.deployment.database(DATABASE).collection::<RawDocumentBuf>("orders");
        let mut orders = Orders::new();
        for _ in 0..self.settings.documents {
            orders.next();
        }
        let mut random = fastrand::Rng::with_seed(5);
        let all =
            i64::try_from(self.settings.documents).map_err(|error| Error::invalid("too many documents").with_source(error))?;
        for round in 0..self.settings.documents / 10_000 + 1 {
            let ids =
                |random: &mut fastrand::Rng, count: usize| -> Vec<i64> { (0..count).map(|_| random.i64(0..all) + 1).collect() };
            let updated = ids(&mut random, 3000);
            let update =
                doc! { "$set": { "status": "returned", "session": format!("{:016x}", random.u64(..)) }, "$inc": { "visits": 1 } };
            collection.update_many(doc! { "_id": { "$in": updated } }, update).await?;
            collection.insert_many((0..1500).map(|_| orders.next()).collect::<Vec<_>>()).await?;
            let deleted = ids(&mut random, 500);
            collection
                .clone_with_type::<Document>()
                .delete_many(doc! { "_id": { "$in": deleted }, "round": { "$ne": i64::try_from(round).unwrap_or(0) } })
                .await?;
        }
        let note = doc! { "appendOplogNote": 1, "data": { "msg": "bench" }, "writeConcern": { "w": "majority" } };
        self.deployment.database("admin").run_command(note).await?;
        let mut scan = oplog.read(begin, oplog.newest().await?);
        let mut entries = Vec::new();
        let namespace = format!("{DATABASE}.orders");
        loop {
            match scan.next().await? {
                OplogRead::Entries(batch) => {
                    for entry in batch.documents()? {
                        let entry = entry?;
                        if entry.get_str("ns").is_ok_and(|ns| ns == namespace) {
                            entries.push(entry.as_bytes().to_vec());
                        }
                    }
                }
                OplogRead::End => return Ok(entries),
                _ => return Err(Error::internal("the oplog was overrun: use fewer documents")),
            }
        }
    }

    async fn replay(&self, entries: &[Vec<u8>], path: Option<ApplyPath>) -> Result<Measured> {
        let started = self.clock.monotonic();
        let mut settings = ReplaySettings::default();
        settings.path = path;
        let mut replay = Replay::open(&self.deployment, settings, CancellationToken::new()).await?;
        let target = Arc::new(ReplayTarget::new(format!("{DATABASE}.orders").parse()?));
        let mut transactions = Transactions::new(1 << 20);
        for entry in entries {
            if let Effect::One(operation) = transactions.take(&Entry::parse(RawDocument::from_bytes(entry)?)?)? {
                replay.push(&target, &operation).await?;
            }
        }
        let (totals, missing) = replay.finish().await?;
        if !missing.is_empty() || totals.operations != entries.len() as u64 {
            return Err(Error::internal("the replay is not complete").with_context("missing", missing.len()));
        }
        Ok(Measured { seconds: self.since(started), written: None, memory: None })
    }
}

/// One at a time, so many take a while.
const FEW: usize = 4_000;
