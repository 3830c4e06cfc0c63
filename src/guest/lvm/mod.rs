//! LVM2: logical volumes of physical volumes.
