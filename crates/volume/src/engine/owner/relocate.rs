//! How the owner makes a checkpoint in which blocks have other places, and nothing else is changed.

use std::panic::AssertUnwindSafe;

use futures::FutureExt;
use hyperfile::SegmentId;
use hyperfile::file::HyperTrait;
use hyperfile::meta_format::BlockPtrFormat;
use log::debug;

use super::{Changed, Owner};
use crate::base::error::VolumeError;
use crate::engine::Relocated;
use crate::engine::bare;
use crate::engine::copy::Reserved;
use crate::format::object_names::of_pointer;
use crate::format::stored_state::{Root, StateId};
use crate::index::location_map::Place;
use crate::index::lookup::push;
use crate::index::relocation::{self, Applied, Move, Relocation, offset_of};

impl Owner {
    /// Sets a number aside: no publish takes it, and what is stored under it is found by who looks for what nobody refers to.
    ///
    /// That is right as long as a publish is reported only once its inode is stored: an open that finds the number unused and a later
    /// one used takes neither up.
    ///
    /// # Errors
    /// When the format has no parts, a compaction by another tool is attached, or the numbers end.
    pub(super) fn reserve(&mut self) -> Result<Reserved, VolumeError> {
        self.check_recovered()?;
        self.check_numbers()?;
        self.check_relocatable()?;
        let container = self.container()?;
        bare::check_number_left(container)
            .map_err(|e| VolumeError::engine("setting a checkpoint number aside", e))?;
        let number: SegmentId = container.inode_mut().get_next_seq();
        let number_max = number.as_cno();
        let inode = container.inode().to_raw(container.bmap_get_raw());
        let base = container.inode().base();
        let meta = container.config().meta.clone();
        self.number_max = self.number_max.max(number_max);
        self.check_numbers()?;
        Ok(Reserved::new(number, inode, base, meta))
    }

    fn check_relocatable(&mut self) -> Result<(), VolumeError> {
        let container = self.container()?;
        if container.config().meta.block_ptr_format != BlockPtrFormat::PartedSegment {
            return Err(VolumeError::InvalidInput(
                "the volume was made in a format in which blocks are not relocated; copy it into a new one"
                    .into(),
            ));
        }
        if container.base_compaction_kept().is_some() {
            // Until the next checkpoint: it is no reason to give up relocating.
            return Err(VolumeError::engine(
                "relocating blocks",
                std::io::Error::other(
                    "another tool has compacted the volume; its next checkpoint takes that in",
                ),
            ));
        }
        Ok(())
    }

    /// Publishes the index with the blocks at their new places, wherever they still are at the old ones, with nothing else under way.
    /// `None` when nothing would change.
    ///
    /// # Errors
    /// After any error the container has gone back to what is stored, or the next publish finds that it must. What is stored is one of
    /// this owner's states, with the relocation or without.
    pub(super) async fn relocate(
        &mut self,
        relocation: &Relocation,
    ) -> Result<Option<Relocated>, VolumeError> {
        self.land_all().await;
        self.check_recovered()?;
        self.check_numbers()?;
        self.check_relocatable()?;
        let before = self.published;
        let begun = AssertUnwindSafe(self.flip(relocation)).catch_unwind().await;
        let (applied, state_id, e) = match self.after(begun) {
            Ok(Flipped::Nothing) => return Ok(None),
            Ok(Flipped::Published(relocated)) => return Ok(Some(relocated)),
            Ok(Flipped::Failed {
                applied,
                state_id,
                error,
            }) => (applied, Some(state_id), error),
            Err(e) => (Applied::default(), None, e),
        };
        self.must_recover = true;
        let recovered = AssertUnwindSafe(self.recover()).catch_unwind().await;
        self.after(recovered)?;
        // Its answer alone was lost. An earlier attempt of a publish may have landed instead.
        if state_id.is_some_and(|state_id| self.published != before && self.published.has_times_of(&state_id))
        {
            let root = Root(self.container()?.bmap_get_raw());
            self.enter(self.places_of_moves(&applied.moved), root);
            return Ok(Some(Relocated {
                checkpoint: self.reported(root),
                applied,
            }));
        }
        Err(e)
    }

    async fn flip(&mut self, relocation: &Relocation) -> Result<Flipped, VolumeError> {
        let failed = |e| VolumeError::engine("changing the index to the copies", e);
        let container = self.container()?;
        if bare::holds_unpublished(container) {
            return Err(VolumeError::Internal(
                "the container holds what is not published".into(),
            ));
        }
        let root = Root(container.bmap_get_raw());
        let (loader, cache) = (container.bmap_get_block_loader(), container.bmap_get_node_cache());
        let tree = relocation::read(&root, loader, cache).map_err(failed)?;
        tree.set_cache_limit(container.config().runtime.node_cache_blocks);
        let applied = relocation::apply(&tree, relocation).await.map_err(failed)?;
        if applied.is_empty() {
            return Ok(Flipped::Nothing);
        }
        let container = self.container()?;
        container.bmap_update(tree);
        renew_times(container);
        let state_id = StateId::of_container(container);
        let checkpoint = match self.flush().await {
            Ok(checkpoint) => checkpoint,
            Err(error) => {
                return Ok(Flipped::Failed {
                    applied,
                    state_id,
                    error,
                });
            }
        };
        let root = Root(self.container()?.bmap_get_raw());
        self.enter(self.places_of_moves(&applied.moved), root);
        debug!(
            "relocated {} blocks and {} index nodes in checkpoint {}",
            applied.moved.len(),
            applied.nodes,
            checkpoint.id.cno
        );
        Ok(Flipped::Published(Relocated { checkpoint, applied }))
    }

    fn places_of_moves(&self, moves: &[Move]) -> Changed {
        let block_bytes = u64::from(self.geometry.now().block_size());
        let mut runs = Vec::new();
        for one in moves {
            let place = Place::Stored {
                object: of_pointer(one.to),
                offset_bytes: offset_of(one.to),
            };
            push(&mut runs, one.block..one.block + 1, place, block_bytes);
        }
        runs.into_iter()
            .map(|run| (run.blocks, Some(run.place)))
            .collect()
    }
}

/// How a flip ended.
enum Flipped {
    /// Nothing was to be changed any more.
    Nothing,
    Published(Relocated),
    /// It is not known whether it is stored.
    Failed {
        applied: Applied,
        /// What its state is told by.
        state_id: StateId,
        error: VolumeError,
    },
}

/// A state is told from the one before it by its times, too: nothing else differs where the number of blocks is the same.
fn renew_times(container: &crate::engine::container::Container) {
    let before = StateId::of_container(container);
    loop {
        container.inode_mut().update_mtime();
        if StateId::of_container(container).mtime != before.mtime {
            return;
        }
        std::hint::spin_loop();
    }
}
