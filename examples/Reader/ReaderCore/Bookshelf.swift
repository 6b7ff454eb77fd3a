import Foundation
import Observation

/// A text that can be read.
struct Book: Identifiable, Hashable, Sendable {
    let file: URL

    var id: URL { file }
    var title: String { file.deletingPathExtension().lastPathComponent }

    /// The text, without white space around it.
    func text() throws -> String {
        let name = file.lastPathComponent
        guard let data = try? Data(contentsOf: file) else { throw ReaderError.unreadableFile(name) }
        guard let text = String(validating: data, as: UTF8.self) else { throw ReaderError.notText(name) }
        let trimmed = text.trimmingCharacters(in: .whitespacesAndNewlines)
        guard !trimmed.isEmpty else { throw ReaderError.emptyText(name) }
        return trimmed
    }
}

/// The texts in the app, and those that a person has added.
@MainActor
@Observable
final class Bookshelf {
    private(set) var books: [Book] = []
    private(set) var problem: Problem?
    private let included: [URL]
    private let folder: URL

    /// - Parameters:
    ///   - included: text files that come with the app.
    ///   - folder: where added ones are kept; made when it is needed.
    init(included: [URL], folder: URL) {
        self.included = included
        self.folder = folder
        refresh()
    }

    func refresh() {
        let added = (try? FileManager.default.contentsOfDirectory(at: folder, includingPropertiesForKeys: nil)) ?? []
        let texts = (included + added).filter { $0.pathExtension == "txt" }
        books = texts.map { Book(file: $0) }.sorted { ($0.title, $0.file.path) < ($1.title, $1.file.path) }
    }

    /// Copies a text file to the shelf; one of the same name is replaced.
    func add(_ file: URL) {
        problem = nil
        do {
            _ = try Book(file: file).text()
            try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
            let name = file.deletingPathExtension().lastPathComponent
            try Data(contentsOf: file).write(to: folder.appendingPathComponent("\(name).txt"), options: .atomic)
        } catch {
            problem = Problem(error)
        }
        refresh()
    }

    /// Whether a person has added it, and may remove it.
    func isAdded(_ book: Book) -> Bool {
        !included.contains(book.file)
    }

    func remove(_ book: Book) {
        guard isAdded(book) else { return }
        try? FileManager.default.removeItem(at: book.file)
        refresh()
    }
}
