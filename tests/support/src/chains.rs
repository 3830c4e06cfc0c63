//! Chains that tests share, some of many layers.

use super::MIB;
use super::rng::Rng;
use super::store::Store;
use super::tools::{Outcome as _, tool};

pub struct Growth {
    pub depth: u64,
    pub size: u64,
    pub cluster_size: u64,
    pub seed: u64,
}

/// Makes `dir/l0000.qcow2` .. and the leaf `dir/leaf.qcow2`, `depth` layers in all. Each layer writes
/// some whole clusters, zeroes one and discards one. Returns the leaf's name.
///
/// A layer is written without opening the layers below it, so the time grows with the depth and not
/// with its square.
pub fn deep_chain(store: &Store, dir: &str, growth: &Growth) -> String {
    let Growth { depth, size, cluster_size, seed } = *growth;
    assert!(depth > 0 && size.is_multiple_of(cluster_size));
    store.dir(dir);
    let mut rng = Rng::new(seed);
    let mut below: Option<String> = None;
    for level in 0..depth {
        let stem = if level + 1 == depth { "leaf".to_owned() } else { format!("l{level:04}") };
        let name = format!("{dir}/{stem}.qcow2");
        let options = format!("cluster_size={cluster_size}");
        let (len, file) = (size.to_string(), format!("{stem}.qcow2"));
        let mut create = vec!["create", "-q", "-f", "qcow2", "-o", &options];
        if let Some(backing) = &below {
            create.extend(["-u", "-b", backing, "-F", "qcow2"]);
        }
        create.extend([name.as_str(), &len]);
        store.img(create);

        let mut at = || rng.below(size / cluster_size) * cluster_size;
        let (one, two, zeroed, gone) = (at(), at(), at(), at());
        let commands = [
            store.write(&mut rng, one, cluster_size),
            store.write(&mut rng, two, cluster_size),
            format!("write -q -z {zeroed} {cluster_size}"),
            format!("discard -q {gone} {cluster_size}"),
        ];
        let driver = format!(r#"{{"driver":"file","filename":"{name}"}}"#);
        let alone = format!(r#"json:{{"driver":"qcow2","discard":"unmap","file":{driver},"backing":null}}"#);
        let mut io = tool("qemu-io");
        for command in &commands {
            io.args(["-c", command]);
        }
        io.arg(alone).current_dir(store.root()).succeeds();
        below = Some(file);
    }
    format!("{dir}/leaf.qcow2")
}

/// `base.raw` <- `mid.qcow2` <- `web.qcow2`.
pub fn small_chain() -> Store {
    let store = Store::new();
    store.raw("base.raw", 2 * MIB, 1);
    store.overlay("mid.qcow2", "base.raw", "raw", "");
    store.scribble("mid.qcow2", "qcow2", 2);
    store.overlay("web.qcow2", "mid.qcow2", "qcow2", "cluster_size=4k");
    store.scribble("web.qcow2", "qcow2", 3);
    store
}
