//! Limits of requests, and the optional features of the kernel.

/// Maximum size of a request in bytes: the kernel's limit of 256 pages.
pub const MAX_REQUEST: u32 = 1 << 20;
/// Maximum number of read-ahead requests in flight.
pub const MAX_BACKGROUND: u16 = 64;
/// Threads of each processor's queue, where requests come over `io_uring`.
pub const RING_THREADS: usize = 2;

/// What the user permits, and the number of threads.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is an option of its own")]
pub struct Features {
    /// Passthrough: the kernel reads frozen raw layers itself (Linux 6.9, root).
    pub passthrough: bool,
    /// Kernel maps: the kernel reads frozen disks of any layers itself (Linux 6.12, root).
    pub kernel_maps: bool,
    /// Parallel writes to one disk (Linux 6.2).
    pub parallel_writes: bool,
    /// Shared writable mappings of active disks (Linux 6.6).
    pub shared_mapping: bool,
    /// Access control lists of guests' files, enforced by the kernel like modes.
    pub access_lists: bool,
    /// Extended attributes. The kernel does not cache that a file has none: programs that ask for them, like
    /// ls(1), cost a request for each file.
    pub extended_attributes: bool,
    /// Requests over `io_uring` (Linux 6.14).
    pub ring: bool,
    /// Worker threads.
    pub threads: usize,
}

/// A capability of the kernel. Without one, the mount works, with the limits in docs/design/resources.md.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capability {
    /// Lookups and listings of one directory at the same time.
    ParallelDirectories,
    /// Listings with attributes.
    ListingsWithAttributes,
    /// The kernel chooses whether a listing has attributes.
    AdaptiveListings,
    /// Direct reads and writes that do not wait for each other.
    AsyncDirect,
    /// Reads of an aborted connection fail with an errno of their own.
    AbortError,
    /// Shared mappings of files that are not cached.
    SharedMapping,
    /// Access control lists. They imply that the kernel enforces modes.
    AccessLists,
    /// File handles that stay valid when the kernel has forgotten their nodes, as NFS servers use them.
    FileHandles,
    /// Passthrough of reads to a registered file.
    Passthrough {
        /// File systems that the file may be stacked on, itself included. The kernel counts two at most, so
        /// that nothing can be stacked on the mount if it uses both.
        stack_depth: u32,
    },
    /// Requests over `io_uring`.
    Ring,
}

impl Features {
    /// The capabilities to ask the kernel for.
    pub(super) fn capabilities(self) -> impl Iterator<Item = Capability> {
        let wanted = [
            (true, Capability::ParallelDirectories),
            (true, Capability::ListingsWithAttributes),
            (true, Capability::AdaptiveListings),
            (true, Capability::AsyncDirect),
            (true, Capability::AbortError),
            (true, Capability::FileHandles),
            (self.shared_mapping, Capability::SharedMapping),
            (self.access_lists, Capability::AccessLists),
            (self.passthrough, Capability::Passthrough { stack_depth: 1 + u32::from(self.kernel_maps) }),
            (self.ring, Capability::Ring),
        ];
        wanted.into_iter().filter_map(|(is_wanted, capability)| is_wanted.then_some(capability))
    }
}
