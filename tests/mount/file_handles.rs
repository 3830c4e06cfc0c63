//! File handles, as NFS servers use them: of nodes that the kernel has forgotten, and of another mount.

use std::fs;

use support::*;

/// Keeps handles of the paths after `keep`, or opens those that were kept, and prints what each one leads to.
const SCRIPT: &str = r"
import ctypes, errno, os, pickle, sys
libc = ctypes.CDLL(None, use_errno=True)
class Handle(ctypes.Structure):
    _fields_ = [('len', ctypes.c_uint), ('kind', ctypes.c_int), ('bytes', ctypes.c_ubyte * 128)]
what, mount, kept = sys.argv[1:4]
if what == 'keep':
    handles = []
    for path in sys.argv[4:]:
        handle, number = Handle(len=128), ctypes.c_int()
        whole = os.fsencode(mount + '/' + path)
        found = libc.name_to_handle_at(-100, whole, ctypes.byref(handle), ctypes.byref(number), 0)
        if found < 0: raise OSError(ctypes.get_errno(), path)
        handles.append((path, bytes(handle)))
    pickle.dump(handles, open(kept, 'wb'))
else:
    root = os.open(mount, os.O_RDONLY)
    if what == 'forgotten':
        for _ in range(2): open('/proc/sys/vm/drop_caches', 'w').write('2')
    for path, kept in pickle.load(open(kept, 'rb')):
        opened = libc.open_by_handle_at(root, ctypes.byref(Handle.from_buffer_copy(kept)), os.O_RDONLY)
        if opened < 0:
            print(path, errno.errorcode[ctypes.get_errno()])
            continue
        place = '/proc/self/fd/%d' % opened
        print(path, 'same' if os.path.samestat(os.stat(place), os.lstat(mount + '/' + path)) else 'another')
        if os.path.isdir(place):
            # The kernel finds its way to the root.
            assert os.readlink(place) == os.path.realpath(mount + '/' + path), os.readlink(place)
            os.listdir(opened)
        else:
            os.read(opened, 1)
";

const PATHS: [&str; 14] = [
    "",
    "README.txt",
    ".chainfs/control",
    ".chainfs/problems.txt",
    "web",
    "web/active.raw",
    "web/snapshots/base.raw",
    "web/info",
    "web/control/status",
    "web/partitions/base/p1.raw",
    "web/files/base",
    "web/files/base/p1",
    "web/files/base/p1/etc/deep",
    "web/files/base/p1/etc/deep/name",
];

/// What the script prints, with `""` for the root.
fn ask(mount: &Mount, what: &str, kept: &std::path::Path, paths: &[&str]) -> String {
    let root = mount.path("");
    let root = root.to_str().expect("text").trim_end_matches('/').to_owned();
    let mut python = tool("python3");
    python.args(["-c", SCRIPT, what, &root]).arg(kept).args(paths);
    python.succeeds()
}

#[test]
// X1
fn a_handle_leads_to_its_file_or_is_stale() {
    let store = Store::new();
    let tree = store.beside("tree");
    fs::create_dir_all(tree.join("etc/deep")).expect("a directory");
    fs::write(tree.join("etc/deep/name"), "web\n").expect("a file");
    store.guest("base.raw", &tree, 6);
    store.overlay("web.qcow2", "base.raw", "raw", "");
    let kept = store.beside("handles");
    let each = |word: &str| PATHS.map(|path| format!("{path} {word}\n")).concat();
    {
        let mount = Mount::new(&store);
        ask(&mount, "keep", &kept, &PATHS);
        assert_eq!(ask(&mount, "forgotten", &kept, &[]), each("same"));
    }
    // Another mount gives the same numbers to other files: only the root has a handle that stays.
    let mount = Mount::new(&store);
    for path in ["web", "web/snapshots", "web/files/base/p1", "web/control"] {
        fs::read_dir(mount.path(path)).expect("a directory").count();
    }
    let stale = each("ESTALE").replacen("ESTALE", "same", 1);
    assert_eq!(ask(&mount, "known", &kept, &[]), stale);
}
