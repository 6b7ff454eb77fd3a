import Foundation
import Observation
import TTTKit

/// A state that was remembered: a file, and what is shown of it.
struct SavedState: Identifiable, Hashable, Codable, Sendable {
    let id: UUID
    var title: String
    /// Tokens of its text.
    let tokens: Int
    let date: Date
}

/// The states that were remembered, newest first. Each is a file that Python's mlx_ttt reads too, and a note beside it.
@MainActor
@Observable
final class StateShelf {
    private(set) var states: [SavedState] = []
    private let folder: URL

    init(folder: URL) {
        self.folder = folder
        refresh()
    }

    /// A state without its note or a note without its state is not shown.
    func refresh() {
        let files = (try? FileManager.default.contentsOfDirectory(at: folder, includingPropertiesForKeys: nil)) ?? []
        let notes = files.filter { $0.pathExtension == "json" }
        states = notes.compactMap { try? JSONDecoder().decode(SavedState.self, from: Data(contentsOf: $0)) }
            .filter { FileManager.default.fileExists(atPath: file(of: $0).path) }
            .sorted { $0.date > $1.date }
    }

    func file(of state: SavedState) -> URL {
        folder.appendingPathComponent("\(state.id.uuidString).state")
    }

    /// The state first, then its note: what is shown is whole.
    @discardableResult
    func save(_ generator: TTTGenerator, title: String, id: UUID = UUID(), date: Date = Date()) async throws
        -> SavedState
    {
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
        let state = SavedState(id: id, title: title, tokens: await generator.position, date: date)
        try await generator.save(to: file(of: state))
        try JSONEncoder().encode(state).write(to: note(of: state), options: .atomic)
        refresh()
        return state
    }

    func remove(_ state: SavedState) {
        for file in [note(of: state), file(of: state)] { try? FileManager.default.removeItem(at: file) }
        refresh()
    }

    private func note(of state: SavedState) -> URL {
        folder.appendingPathComponent("\(state.id.uuidString).json")
    }
}
