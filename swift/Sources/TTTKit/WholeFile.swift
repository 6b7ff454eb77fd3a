import Foundation

/// Files that are there whole or not at all, however the process ends.
enum WholeFile {
    /// One at a time, because a file is written beside its place under a name of its own.
    private static let turn = NSLock()

    /// Writes beside the file, waits until that is on the disk, and renames it.
    ///
    /// What is left when the process is killed has the same name each time, so the next call writes over it.
    static func write(_ data: Data, to file: URL) throws {
        let partial = file.deletingLastPathComponent().appendingPathComponent(".\(file.lastPathComponent).partial")
        try turn.withLock {
            do {
                try data.write(to: partial)
                let handle = try FileHandle(forWritingTo: partial)
                defer { try? handle.close() }
                try handle.synchronize()
                guard rename(partial.path, file.path) == 0 else { throw CocoaError(.fileWriteUnknown) }
            } catch {
                try? FileManager.default.removeItem(at: partial)
                throw error
            }
        }
    }
}
