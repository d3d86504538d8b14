//! Writing packs anew without what no snapshot needs.

use std::{collections::BTreeMap, sync::Arc};

use mongo_core::{
    Error, Result,
    progress::{PhaseMeter, Total},
};

use super::{Live, PackSet, Prune};
use crate::repository::{
    pack::PackId,
    segment::{Content, SegmentId},
    store::{BlockWriter, SegmentStore, storing},
};

impl Prune {
    /// Stores what is needed of some packs once more, in new packs, and index objects for these. Every segment is checked on the way.
    pub(super) async fn repack(&self, packs: &[PackId], live: &Live) -> Result<()> {
        let chosen: PackSet = packs.iter().copied().collect();
        let mut wanted: BTreeMap<PackId, Vec<(SegmentId, Content)>> = BTreeMap::new();
        for (id, content, places) in live.needed() {
            // What lies in a pack that stays as well is safe already.
            if let Some(place) = places.iter().find(|place| chosen.contains(&place.pack))
                && !live.index().holds_outside(id, &chosen)
            {
                wanted.entry(place.pack).or_default().push((id, content));
            }
        }
        let meter = PhaseMeter::start(Arc::clone(&self.progress), "repack", Total::Unknown);
        let store = SegmentStore::anew(&self.repository, REPACK_LEVEL)?;
        storing(store, &self.cancel, |store| self.copy(wanted, store, &meter)).await?;
        meter.finish();
        Ok(())
    }

    async fn copy(
        &self,
        wanted: BTreeMap<PackId, Vec<(SegmentId, Content)>>,
        store: Arc<SegmentStore>,
        meter: &PhaseMeter,
    ) -> Result<()> {
        let mut writer = BlockWriter::new(Arc::clone(&store));
        for segments in wanted.into_values() {
            for kind in [Content::Documents, Content::Node] {
                let ids: Vec<SegmentId> = segments.iter().filter(|(_, content)| *content == kind).map(|(id, _)| *id).collect();
                for ids in ids.chunks(SEGMENTS_AT_ONCE) {
                    self.check_cancelled()?;
                    let plain = self.repository.read_segments(kind, ids).await?;
                    let bytes = plain.iter().map(|segment| segment.len() as u64).sum();
                    writer = tokio::task::spawn_blocking(move || {
                        for segment in &plain {
                            writer.put(kind, segment)?;
                        }
                        Ok::<_, Error>(writer)
                    })
                    .await??;
                    store.send_full().await?;
                    meter.advance(ids.len() as u64, bytes);
                }
            }
        }
        tokio::task::spawn_blocking(move || writer.flush()).await?
    }
}

/// A prune is in no hurry: the preset for size.
const REPACK_LEVEL: i32 = 3;
const SEGMENTS_AT_ONCE: usize = 64;
