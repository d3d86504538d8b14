//! What the next backup costs after a part of the documents has changed.

use std::{fmt, path::Path};

use mongo_backup::{Backup, LocalArchive, Repository};
use mongo_core::{
    Error, Result,
    bson::{Document, RawDocumentBuf, doc},
    clock::Clock as _,
};
use serde::Serialize;

use crate::{Bench, DATABASE, middle, orders::Orders, remove, size_of};

/// A full backup, a change, and the backup after it. Seconds are medians of all runs; bytes are those of the last one.
#[derive(Clone, Serialize)]
pub(crate) struct Round {
    pub(crate) what: String,
    pub(crate) changed_documents: u64,
    pub(crate) first_seconds: f64,
    pub(crate) next_seconds: f64,
    pub(crate) first_bytes: u64,
    /// By how much the archive grew.
    pub(crate) grown_bytes: u64,
    /// The same as a share of what the first backup stored.
    pub(crate) grown_share: f64,
}

impl Round {
    fn middle(measured: &[Self]) -> Option<Self> {
        let seconds = |of: fn(&Self) -> f64| middle(measured.iter().map(of));
        let mut round = measured.last()?.clone();
        round.first_seconds = seconds(|round| round.first_seconds);
        round.next_seconds = seconds(|round| round.next_seconds);
        Some(round)
    }
}

/// Where changes lie.
#[derive(Clone, Copy)]
enum Spread {
    Scattered,
    /// A tenth of the documents gets nine tenths of the changes.
    Skewed,
    Appended,
}

impl Spread {
    const ALL: [Self; 3] = [Self::Scattered, Self::Skewed, Self::Appended];
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Scattered => "scattered",
            Self::Skewed => "skewed",
            Self::Appended => "appended",
        })
    }
}

impl Bench {
    pub(crate) async fn rounds(&self, folder: &Path) -> Result<Vec<Round>> {
        let mut rounds = Vec::new();
        let mut orders = Orders::new();
        for _ in 0..self.settings.documents {
            orders.next();
        }
        let mut random = fastrand::Rng::with_seed(5);
        let archive = folder.join("rounds");
        for share in [0.0].into_iter().chain(self.settings.changed.iter().map(|percent| percent / 100.0)) {
            let spreads: &[_] = if share > 0.0 { &Spread::ALL } else { &[Spread::Scattered] };
            for spread in spreads {
                let mut measured = Vec::new();
                for _ in 0..self.settings.runs.max(1) {
                    measured.push(self.round(&archive, *spread, share, &mut orders, &mut random).await?);
                }
                rounds.extend(Round::middle(&measured));
            }
        }
        Ok(rounds)
    }

    async fn round(
        &self,
        archive: &Path,
        spread: Spread,
        share: f64,
        orders: &mut Orders,
        random: &mut fastrand::Rng,
    ) -> Result<Round> {
        let repository = Repository::open_or_init(LocalArchive::new(archive)?, self.key()).await?;
        self.rest().await?;
        let first_seconds = self.one(&repository).await?;
        let first_bytes = size_of(archive)?;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "a share of a count"
        )]
        let count = (self.settings.documents as f64 * share) as u64;
        match spread {
            Spread::Appended => self.append(orders, count).await?,
            _ => self.change(random, spread, count).await?,
        }
        self.rest().await?;
        let next_seconds = self.one(&repository).await?;
        let grown_bytes = size_of(archive)? - first_bytes;
        remove(archive)?;
        #[expect(clippy::cast_precision_loss, reason = "figures for a person")]
        let grown_share = grown_bytes as f64 / first_bytes as f64;
        let what = if share > 0.0 { format!("{:.1} % {spread}", share * 100.0) } else { "unchanged".to_owned() };
        Ok(Round { what, changed_documents: count, first_seconds, next_seconds, first_bytes, grown_bytes, grown_share })
    }

    async fn one(&self, repository: &Repository) -> Result<f64> {
        let started = self.clock.monotonic();
        let backup = Backup::builder(&self.deployment, repository).compression_level(self.settings.level);
        backup.namespaces(&format!("{DATABASE}.*")).build()?.run().await?;
        Ok(self.since(started))
    }

    async fn change(&self, random: &mut fastrand::Rng, spread: Spread, count: u64) -> Result<()> {
        let collection = self.deployment.database(DATABASE).collection::<Document>("orders");
        let all =
            i64::try_from(self.settings.documents).map_err(|error| Error::invalid("too many documents").with_source(error))?;
        let mut ids: Vec<i64> = (0..count)
            .map(|number| match spread {
                Spread::Skewed if number % 10 > 0 => random.i64(0..(all / 10).max(1)) + 1,
                _ => random.i64(0..all) + 1,
            })
            .collect();
        ids.sort_unstable();
        for ids in ids.chunks(1000) {
            let update = doc! { "$set": { "status": "returned", "session": format!("{:016x}", random.u64(..)) } };
            collection.update_many(doc! { "_id": { "$in": ids } }, update).await?;
        }
        Ok(())
    }

    async fn append(&self, orders: &mut Orders, count: u64) -> Result<()> {
        let collection = self.deployment.database(DATABASE).collection::<RawDocumentBuf>("orders");
        let mut left = count;
        while left > 0 {
            let batch = left.min(2000);
            collection.insert_many((0..batch).map(|_| orders.next()).collect::<Vec<_>>()).await?;
            left -= batch;
        }
        Ok(())
    }
}
