//! The stored parts of a container: how they are read and checked, and how they are named. Nothing here uses an open
//! container.
//!
//! * [`block_lengths`] (pure): how long blocks are stored.
//! * [`inode`]: loads the inode; whether bytes can be one.
//! * [`node`] (pure): whether bytes can be a node of the index.
//! * [`segment_header`] (pure): whether bytes can be the header of a segment.
//! * [`summary`] (pure): what an object says of its content.
//! * [`object_names`] (pure): names of a container's objects, and the numbers that stand for them.
//! * [`stored_objects`]: lists a container's objects, and those that it has inherited.
//! * [`stored_state`] (pure): which state of a container an inode tells of.

pub(crate) mod block_lengths;
pub(crate) mod inode;
pub(crate) mod node;
pub(crate) mod object_names;
pub(crate) mod segment_header;
pub(crate) mod stored_objects;
pub(crate) mod stored_state;
pub(crate) mod summary;
