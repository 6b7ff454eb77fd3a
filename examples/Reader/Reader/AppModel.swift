import Foundation
import Observation

/// What the app has: its texts, its states, and a session once the model is loaded.
@MainActor
@Observable
final class AppModel {
    enum Loading {
        case busy
        case ready(ReadingSession, ModelFiles)
        case failed(Problem)
    }

    private(set) var loading = Loading.busy
    let books: Bookshelf
    let states: StateShelf

    init() {
        let support = URL.applicationSupportDirectory.appending(path: "Reader")
        let included = Bundle.main.urls(forResourcesWithExtension: "txt", subdirectory: nil) ?? []
        books = Bookshelf(included: included, folder: support.appending(path: "Books"))
        states = StateShelf(folder: support.appending(path: "States"))
    }

    func load() async {
        guard case .busy = loading else { return }
        do {
            guard let folder = Bundle.main.resourceURL else { throw ReaderError.noModel }
            let files = try ModelFiles(in: folder)
            let session = ReadingSession(
                generator: try await files.generator(), shelf: states, options: files.options())
            loading = .ready(session, files)
        } catch {
            loading = .failed(Problem(error) ?? .reader(.noModel))
        }
    }
}
